"""Rescue: every orphan finds one survivor, evenly, and nobody is asked when nobody is left."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.control.rescue import plan_rescue

PLACES = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 7)))


def test_worked_example() -> None:
    survivors = {"a": [(1, 0), (1, 1)], "b": [(1, 2)]}
    assert plan_rescue([(1, 3), (1, 4), (1, 5)], survivors) == {(1, 3): "b", (1, 4): "a", (1, 5): "b"}


def test_nobody_is_left() -> None:
    assert plan_rescue([(1, 3)], {}) == {}


@given(orphans=PLACES, first=PLACES, second=PLACES)
def test_every_orphan_has_one_home_and_layers_stay_even(
    orphans: set[tuple[int, int]], first: set[tuple[int, int]], second: set[tuple[int, int]]
) -> None:
    survivors = {"a": first - orphans, "b": second - orphans}
    homes = plan_rescue(sorted(orphans), survivors)
    assert set(homes) == orphans
    for layer in range(3):
        before = {w: sum(place[0] == layer for place in held) for w, held in survivors.items()}
        taken = Counter(worker for place, worker in homes.items() if place[0] == layer)
        after = {w: before[w] + taken[w] for w in survivors}
        gap = abs(before["a"] - before["b"])
        assert abs(after["a"] - after["b"]) <= max(1, gap - sum(taken.values()))
