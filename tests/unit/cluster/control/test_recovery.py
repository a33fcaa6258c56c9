"""A controller that starts again keeps the placement that its workers hold, less what was under way."""

import pytest

from cluster.control.recovery import recover_placement
from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement
from workers.expert.types import Slot

SHAPE = ExpertShape(num_experts=4, layer_ids=(1,))
HOSTS = [ExpertHost(worker_id="a"), ExpertHost(worker_id="b")]


def slots(*experts: int) -> tuple[Slot, ...]:
    return tuple(Slot(1, idx, expert) for idx, expert in enumerate(experts))


def recover(a: tuple[Slot, ...], b: tuple[Slot, ...], num_slots: int = 0) -> Placement:
    return recover_placement(SHAPE, HOSTS, {"a": a, "b": b}, num_slots=num_slots)


def test_worked_example_drops_the_copy_beyond_the_slots() -> None:
    assert recover(slots(0, 1, 2), slots(2, 3)) == {"a": slots(0, 1), "b": slots(2, 3)}


def test_an_odd_placement_is_kept_as_it_is() -> None:
    assert recover(slots(3, 1), slots(0, 2)) == {"a": slots(3, 1), "b": slots(0, 2)}


def test_replicas_within_the_slots_are_kept() -> None:
    held = {"a": slots(0, 1, 2), "b": slots(2, 3, 0)}
    assert recover(held["a"], held["b"], num_slots=3) == held


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (slots(0, 1), slots(2)),
        (slots(0, 1, 2, 3), ()),
        (slots(0, 1, 2), slots(3)),
    ],
    ids=["an expert is missing", "a worker is empty", "too many that nobody else has"],
)
def test_what_cannot_stay_is_planned_anew(a: tuple[Slot, ...], b: tuple[Slot, ...]) -> None:
    assert recover(a, b) == plan_placement(SHAPE, HOSTS)
