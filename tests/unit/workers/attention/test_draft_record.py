"""What one sequence's drafts did decides how many of a step's drafts it gets."""

import random

import pytest

from workers.attention.draft_record import DraftRecord


def told(chance: float, num_steps: int = 60, *, most: int = 3, seed: int = 0) -> DraftRecord:
    """The record of a sequence whose drafts stand with this chance."""
    rng, record = random.Random(seed), DraftRecord()
    for _ in range(num_steps):
        step(record, rng, chance, most=most)
    return record


def step(record: DraftRecord, rng: random.Random, chance: float, *, most: int) -> int:
    num_drafts = record.plan_drafts(most)
    record.on_step(num_drafts, next((i for i in range(num_drafts) if rng.random() >= chance), num_drafts))
    return num_drafts


def test_new_sequence_gets_all_of_three_drafts() -> None:
    assert DraftRecord().plan_drafts(3) == 3


@pytest.mark.parametrize(("accepted", "num_drafts"), [(6.0, 3), (4.0, 2), (3.0, 1), (0.5, 0), (10.0, 3)])
def test_worked_example(accepted: float, num_drafts: int) -> None:
    assert DraftRecord(num_drafted=10.0, num_accepted=accepted).plan_drafts(3) == num_drafts


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_never_more_than_the_step_drafts(most: int, chance: float) -> None:
    rng, record = random.Random(1), DraftRecord()
    assert all(step(record, rng, chance, most=most) <= most for _ in range(200))


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_learnt_whatever_is_drafted(seed: int) -> None:
    record = told(0.7, 200, seed=seed)
    assert record.chance == pytest.approx(0.7, abs=0.3)


def test_drafts_that_never_stand_are_tried_now_and_then() -> None:
    rng, record = random.Random(0), told(0.0)
    assert sum(step(record, rng, 0.0, most=3) for _ in range(990)) == 990 // 33


@pytest.mark.parametrize("seed", range(5))
def test_drafts_that_stand_in_most_cases_are_hardly_ever_spared(seed: int) -> None:
    rng, record = random.Random(seed), told(0.6, seed=seed)
    assert sum(step(record, rng, 0.6, most=1) for _ in range(1000)) >= 995


def test_text_that_becomes_predictable_is_noticed_at_the_next_try() -> None:
    record = told(0.0)
    num_steps = 0
    while record.plan_drafts(1) == 0:
        record.on_step(0, 0)
        num_steps += 1
    assert num_steps <= 32
    for _ in range(3):
        record.on_step(1, 1)
        assert record.plan_drafts(1) == 1
    assert record.chance > 0.1
