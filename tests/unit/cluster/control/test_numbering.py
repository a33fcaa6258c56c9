"""Slot numbers: an expert stays where it is, no two share a slot, no number is wasted."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.control.numbering import number_slots, renumber
from workers.expert.types import Slot

HELD = st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, 9)), st.integers(0, 20), max_size=8)


def test_worked_example() -> None:
    slots = number_slots({(1, 5): 0, (1, 6): 1}, [(1, 6), (1, 7), (1, 8)])
    assert slots == (Slot(1, 0, 7), Slot(1, 1, 6), Slot(1, 2, 8))


@given(held=HELD, wanted=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 9)), max_size=12))
def test_what_stays_keeps_its_slot_and_no_slot_is_taken_twice(
    held: dict[tuple[int, int], int], wanted: set[tuple[int, int]]
) -> None:
    by_slot = {(layer, slot): (layer, expert) for (layer, expert), slot in held.items()}
    held = {place: slot for (_, slot), place in by_slot.items()}
    slots = number_slots(held, wanted)
    assert {slot.place for slot in slots} == wanted
    assert len({(slot.layer_idx, slot.slot_idx) for slot in slots}) == len(wanted)
    assert all(slot.slot_idx == held[slot.place] for slot in slots if slot.place in held)


def test_numbers_without_gaps_in_every_layer() -> None:
    placement = {"a": (Slot(1, 3, 7), Slot(1, 5, 2), Slot(2, 4, 0))}
    assert renumber(placement) == {"a": (Slot(1, 0, 7), Slot(1, 1, 2), Slot(2, 0, 0))}
