"""Which slot each expert of a worker lies in: an expert stays where it is as long as it is held. Pure."""

from collections.abc import Iterable, Mapping

from cluster.placement import Placement
from workers.expert.types import Place, Slot


def number_slots(held: Mapping[Place, int], wanted: Iterable[Place]) -> tuple[Slot, ...]:
    """The slots of `wanted`, in order.

    Worked example: expert 5 lies in slot 0 and expert 6 in slot 1; wanted are 6, 7 and 8. 6 stays in slot
    1, 7 gets slot 0, 8 gets slot 2.

    Args:
        held: place -> its slot now.
        wanted: places that are to be held.
    """
    wanted = sorted(set(wanted))
    taken = {(place[0], held[place]) for place in wanted if place in held}
    next_idx: dict[int, int] = {}
    slots = []
    for layer_idx, expert_idx in wanted:
        slot_idx = held.get((layer_idx, expert_idx), -1)
        if slot_idx < 0:
            slot_idx = next_idx.get(layer_idx, 0)
            while (layer_idx, slot_idx) in taken:
                slot_idx += 1
            next_idx[layer_idx] = slot_idx + 1
        slots.append(Slot(layer_idx, slot_idx, expert_idx))
    return tuple(sorted(slots))


def renumber(placement: Placement) -> Placement:
    """The same placement with the slots of every layer numbered from 0 without gaps, in their order."""
    return {worker_id: _without_gaps(slots) for worker_id, slots in placement.items()}


def _without_gaps(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    num_in_layer: dict[int, int] = {}
    numbered = []
    for slot in sorted(slots):
        slot_idx = num_in_layer.get(slot.layer_idx, 0)
        num_in_layer[slot.layer_idx] = slot_idx + 1
        numbered.append(Slot(slot.layer_idx, slot_idx, slot.expert_idx))
    return tuple(numbered)
