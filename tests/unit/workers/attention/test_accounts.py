"""What was computed for whom: nobody is forgotten, and nobody earns by waiting."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.attention.accounts import Pace, TenantAccounts, token_cost


@pytest.mark.parametrize(("num_tokens", "first", "cost"), [(1, 0, 1), (1, 65536, 2), (10, 32768, 15)])
def test_cost_grows_with_the_context(num_tokens: int, first: int, cost: float) -> None:
    assert token_cost(num_tokens, first_position=first, context_cost_tokens=65536) == cost


class AccountsMachine(RuleBasedStateMachine):
    """Sequences of three tenants come, are charged and go."""

    @initialize()
    def build(self) -> None:
        self.accounts = TenantAccounts()
        self.open: list[str] = []

    @rule(tenant=st.sampled_from("abc"))
    def enter(self, tenant: str) -> None:
        before = dict(self.accounts.served)
        self.accounts.enter(tenant)
        wanted = before.get(tenant, min(before.values(), default=0.0))
        assert self.accounts.served == {**before, tenant: wanted}
        self.open.append(tenant)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), cost=st.integers(1, 9))
    def charge(self, data: st.DataObject, cost: int) -> None:
        tenant = data.draw(st.sampled_from(self.open))
        before = self.accounts.served[tenant]
        self.accounts.charge(tenant, cost)
        assert self.accounts.served[tenant] == before + cost

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(self.open))
        self.open.remove(tenant)
        self.accounts.leave(tenant)

    @invariant()
    def only_open_tenants_are_remembered(self) -> None:
        if hasattr(self, "accounts"):
            assert set(self.accounts.served) == set(self.open)


AccountsMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestAccounts = AccountsMachine.TestCase


def test_pace_is_the_fastest_of_the_large_steps() -> None:
    pace = Pace()
    pace.observe(cost=1, seconds=0.001)
    assert pace.seconds_per_cost == 0
    for cost, seconds in [(100, 2.0), (100, 1.0), (200, 3.0)]:
        pace.observe(cost=cost, seconds=seconds)
    assert pace.seconds_per_cost == 0.01
