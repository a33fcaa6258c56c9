"""The account of what is in flight stays right, whatever the order of events."""

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.requests.ledger import Ledger
from router.requests.members import Worker
from router.requests.selection import Load, Route
from wire.errors import InternalError


def worker(idx: int) -> Worker:
    return Worker(
        worker_id=f"w{idx}", incarnation=1, address="x:1", can_prefill=True, can_decode=True, num_pages=9
    )


ROUTE = Route(decode=worker(0), prefill=worker(1))


def test_lease_books_both_workers_and_gives_back_step_by_step():
    ledger = Ledger()
    lease = ledger.open(ROUTE, prompt_tokens=30, num_pages=4)
    assert ledger.loads == {
        "w0#1": Load(reserved_pages=4, num_requests=1),
        "w1#1": Load(queued_prompt_tokens=30),
    }
    ledger.end_prefill(lease)
    assert ledger.loads == {"w0#1": Load(reserved_pages=4, num_requests=1)}
    ledger.close(lease)
    assert ledger.loads == {}


def test_lease_closed_twice_is_an_error():
    ledger = Ledger()
    lease = ledger.open(ROUTE, prompt_tokens=1, num_pages=1)
    ledger.close(lease)
    with pytest.raises(InternalError, match="closed twice"):
        ledger.close(lease)


def test_lease_of_another_ledger_is_an_error():
    ledger = Ledger()
    lease = ledger.open(ROUTE, prompt_tokens=1, num_pages=1)
    with pytest.raises(InternalError):
        ledger.close(dataclasses.replace(lease, num_pages=2))


def test_integrity_check_names_the_worker_whose_account_is_wrong():
    ledger = Ledger()
    ledger.open(ROUTE, prompt_tokens=1, num_pages=1)
    ledger._loads["w0#1"] = Load(reserved_pages=2, num_requests=1)
    with pytest.raises(InternalError, match="w0#1"):
        ledger.check_integrity()


class LedgerMachine(RuleBasedStateMachine):
    """Opens, advances and closes leases in any order."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger()
        self.open_leases = []

    @rule(
        decode=st.integers(0, 2),
        prefill=st.integers(0, 2),
        tokens=st.integers(0, 99),
        pages=st.integers(0, 9),
    )
    def open(self, decode, prefill, tokens, pages):
        route = Route(decode=worker(decode), prefill=worker(prefill))
        self.open_leases.append(self.ledger.open(route, prompt_tokens=tokens, num_pages=pages))

    @rule(data=st.data())
    def end_prefill(self, data):
        if self.open_leases:
            self.ledger.end_prefill(data.draw(st.sampled_from(self.open_leases)))

    @rule(data=st.data())
    def close(self, data):
        if self.open_leases:
            lease = data.draw(st.sampled_from(self.open_leases))
            self.open_leases.remove(lease)
            self.ledger.close(lease)

    @invariant()
    def accounts_are_right(self):
        self.ledger.check_integrity()
        loads = self.ledger.loads
        assert sum(load.num_requests for load in loads.values()) == len(self.open_leases)
        assert sum(load.reserved_pages for load in loads.values()) == sum(
            lease.num_pages for lease in self.open_leases
        )

    def teardown(self):
        for lease in self.open_leases:
            self.ledger.close(lease)
        assert self.ledger.loads == {}


TestLedgerMachine = LedgerMachine.TestCase
