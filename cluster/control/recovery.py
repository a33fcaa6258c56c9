"""The placement of a cluster whose controller starts again: what its workers hold already. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement, slots_per_layer
from workers.expert.types import Place, Slot


def recover_placement(
    shape: ExpertShape,
    hosts: Sequence[ExpertHost],
    held: Mapping[str, Sequence[Slot]],
    *,
    num_slots: int,
) -> Placement:
    """What workers hold, less the copies beyond their slots (of a move or a rescue under way).

    Where that leaves an expert without a home, or a worker without any, all is planned anew.

    Worked example: with 2 slots a layer, worker a holds experts 0, 1 and 2, worker b holds 2 and 3. Expert
    2 has another copy, so a keeps 0 and 1.

    Args:
        shape: what must be covered.
        hosts: every expert worker.
        held: worker -> slots that it reported.
        num_slots: of each worker in each layer; 0 = just enough.
    """
    per_layer = slots_per_layer(shape.num_experts, len(hosts), num_slots)
    num_copies = Counter(slot.place for host in hosts for slot in held.get(host.worker_id, ()))
    kept = {host.worker_id: _within(held.get(host.worker_id, ()), per_layer, num_copies) for host in hosts}
    is_covered = all(
        num_copies[layer, expert] for layer in shape.layer_ids for expert in range(shape.num_experts)
    )
    most = max(Counter((w, s.layer_idx) for w, slots in kept.items() for s in slots).values(), default=0)
    if is_covered and most <= per_layer and all(kept.values()):
        return kept
    return plan_placement(shape, hosts, num_slots=num_slots)


def _within(slots: Sequence[Slot], per_layer: int, num_copies: Counter[Place]) -> tuple[Slot, ...]:
    """Less the slots beyond `per_layer` whose expert has another copy; they are taken off `num_copies`."""
    in_layer = Counter(slot.layer_idx for slot in slots)
    kept = []
    for slot in sorted(slots, key=lambda slot: (-num_copies[slot.place], slot)):
        if in_layer[slot.layer_idx] > per_layer and num_copies[slot.place] > 1:
            in_layer[slot.layer_idx] -= 1
            num_copies[slot.place] -= 1
        else:
            kept.append(slot)
    return tuple(sorted(kept))
