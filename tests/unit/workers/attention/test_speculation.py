"""Which drafts stand, and how many are drafted: against a worker of known speed and text of known chance."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.draft_record import DraftRecord
from workers.attention.speculation import DraftPolicy, DraftRules, accept_drafts

TOKENS = st.integers(0, 3)


@pytest.mark.parametrize(
    ("draft_ids", "chosen_ids", "stops", "max_tokens", "new_ids"),
    [
        ((), (5,), (), 9, (5,)),
        ((7, 8, 9), (7, 8, 5, 4), (), 9, (7, 8, 5)),
        ((7, 8, 9), (7, 8, 9, 4), (), 9, (7, 8, 9, 4)),
        ((7, 8, 9), (6, 8, 9, 4), (), 9, (6,)),
        ((7, 8, 9), (7, 8, 9, 4), (7,), 9, (7,)),
        ((7, 8, 9), (7, 8, 9, 4), (8, 4), 9, (7, 8)),
        ((7, 8, 9), (7, 8, 9, 4), (), 2, (7, 8)),
        ((7, 8, 9), (7, 8, 9, 4), (), 1, (7,)),
    ],
)
def test_new_tokens_end_at_the_first_wrong_draft_stop_or_limit(
    draft_ids: tuple[int, ...],
    chosen_ids: tuple[int, ...],
    stops: tuple[int, ...],
    max_tokens: int,
    new_ids: tuple[int, ...],
) -> None:
    stop_token_ids = frozenset(stops)
    assert (
        accept_drafts(draft_ids, chosen_ids, stop_token_ids=stop_token_ids, max_tokens=max_tokens) == new_ids
    )


@given(st.lists(TOKENS, max_size=4), st.data(), st.frozensets(TOKENS, max_size=2), st.integers(1, 6))
def test_new_tokens_are_those_of_one_at_a_time(
    draft_ids: list[int], data: st.DataObject, stops: frozenset[int], max_tokens: int
) -> None:
    """Choosing again after each token, from the tokens so far, gives the same tokens, only one at a time."""
    size = len(draft_ids) + 1
    chosen_ids = data.draw(st.lists(TOKENS, min_size=size, max_size=size))
    new_ids = accept_drafts(draft_ids, chosen_ids, stop_token_ids=stops, max_tokens=max_tokens)
    assert 1 <= len(new_ids) <= min(size, max_tokens)
    assert list(new_ids) == chosen_ids[: len(new_ids)]
    assert list(new_ids[:-1]) == draft_ids[: len(new_ids) - 1]
    assert not stops.intersection(new_ids[:-1])
    is_over = new_ids[-1] in stops or len(new_ids) == max_tokens
    assert is_over or len(new_ids) == size or draft_ids[len(new_ids) - 1] != new_ids[-1]


def speed_up(
    policy: DraftPolicy, *, chance: float, cost: float, batch: int, num_steps: int = 600, seed: int = 5
) -> float:
    """How much faster than without drafts a worker is for which each draft costs a share of a step."""
    return speed_up_of([chance] * batch, policy, cost=cost, num_steps=num_steps, seed=seed)


def speed_up_of(
    chances: Sequence[float], policy: DraftPolicy, *, cost: float, num_steps: int = 600, seed: int = 5
) -> float:
    """The same for sequences whose drafts stand with chances of their own."""
    rng, batch = random.Random(seed), len(chances)
    records = [DraftRecord() for _ in chances]
    num_tokens = seconds = 0.0
    for _ in range(num_steps):
        num_drafts = policy.plan_drafts(batch)
        each = policy.plan_each(num_drafts, records)
        accepted = [_num_stood(rng, num, chance) for num, chance in zip(each, chances, strict=True)]
        for record, num, stood in zip(records, each, accepted, strict=True):
            record.on_step(num, stood)
        step_seconds = (1 + cost * sum(each) / batch) * rng.uniform(0.9, 1.1)
        policy.on_step(batch, num_drafts, seconds=step_seconds, accepted=accepted)
        num_tokens += 1 + sum(accepted) / batch
        seconds += step_seconds
    return num_tokens / seconds


def _num_stood(rng: random.Random, num_drafts: int, chance: float) -> int:
    return next((i for i in range(num_drafts) if rng.random() >= chance), num_drafts)


class SparesNone(DraftPolicy):
    """Every sequence gets the same."""

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        return [num_drafts] * len(records)


@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize(("cost", "gain"), [(0.1, 1.08), (0.2, 1.15), (0.4, 1.08)])
def test_predictable_text_beside_text_that_is_not_keeps_its_drafts(
    batch: int, cost: float, gain: float
) -> None:
    """Half of the sequences have drafts that stand at 80 %, half have drafts that never do."""
    chances = [0.8, 0.0] * (batch // 2)
    rules = DraftRules(max_drafts=3)
    sparing, all_alike = (
        speed_up_of(chances, policy(rules), cost=cost) for policy in (DraftPolicy, SparesNone)
    )
    assert sparing >= gain * all_alike


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("cost", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("max_drafts", [1, 3])
def test_drafts_bring_nearly_what_the_best_number_brings(
    chance: float, cost: float, batch: int, max_drafts: int
) -> None:
    got = speed_up(DraftPolicy(DraftRules(max_drafts=max_drafts)), chance=chance, cost=cost, batch=batch)
    best = max(
        sum(chance**i for i in range(num_drafts + 1)) / (1 + cost * num_drafts)
        for num_drafts in range(max_drafts + 1)
    )
    assert got >= 0.93 * best


@pytest.mark.parametrize("batch", [1, 8, 32, 64])
@pytest.mark.parametrize("cost", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_drafts_that_never_stand_cost_a_twentieth_at_most(seed: int, cost: float, batch: int) -> None:
    policy = DraftPolicy(DraftRules(max_drafts=3))
    assert speed_up(policy, chance=0.0, cost=cost, batch=batch, seed=seed) >= 0.95


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_is_slow_at_times_is_not_taken_for_drafts_that_pay(seed: int, batch: int) -> None:
    """Steps take three times as long for a while, whatever is drafted; no draft stands."""
    rng = random.Random(seed)
    policy = DraftPolicy(DraftRules(max_drafts=3))
    plain = drafting = 0.0
    factor, until = 1.0, 0
    for step in range(600):
        if step == until:
            factor, until = rng.choice([1.0, 3.0]), step + rng.randint(5, 60)
        num_drafts = policy.plan_drafts(batch)
        seconds = factor * rng.uniform(1.0, 1.3)
        policy.on_step(batch, num_drafts, seconds=seconds * (1 + 0.4 * num_drafts), accepted=[0] * batch)
        plain += seconds
        drafting += seconds * (1 + 0.4 * num_drafts)
    assert plain / drafting >= 0.95


@pytest.mark.parametrize("batch", [1, 32])
def test_text_that_becomes_predictable_is_noticed(batch: int) -> None:
    policy = DraftPolicy(DraftRules(max_drafts=1))
    assert speed_up(policy, chance=0.0, cost=0.4, batch=batch) >= 0.95
    assert speed_up(policy, chance=0.9, cost=0.4, batch=batch) >= 1.2
    assert speed_up(policy, chance=0.0, cost=0.4, batch=batch) >= 0.95


def test_a_size_of_batch_at_which_drafts_do_not_pay_gets_few() -> None:
    """Text with a chance of 60 %: at batch 1 a draft costs a fifth of a step, at batch 32 nine tenths."""
    policy = DraftPolicy(DraftRules(max_drafts=1))
    for _ in range(4):
        speed_up(policy, chance=0.6, cost=0.2, batch=1, num_steps=100)
        speed_up(policy, chance=0.6, cost=0.9, batch=32, num_steps=100)
    assert speed_up(policy, chance=0.6, cost=0.2, batch=1) >= 1.28
    assert speed_up(policy, chance=0.6, cost=0.9, batch=32) >= 0.97


def test_it_never_plans_more_than_it_may() -> None:
    policy = DraftPolicy(DraftRules(max_drafts=2))
    for step in range(300):
        num_drafts = policy.plan_drafts(1 + step % 40)
        assert 0 <= num_drafts <= 2
        policy.on_step(1 + step % 40, num_drafts, seconds=1.0, accepted=[num_drafts] * (1 + step % 40))
