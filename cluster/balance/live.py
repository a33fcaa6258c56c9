"""The balancer for a running cluster: placements of workers and slots in, the same out.

Arrays know nothing of worker ids, layer numbers and slot indices; the conversions stand here. A worker that
was not in the previous placement comes with empty slots, the experts of one that left are placed anew.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.balance.homes import plan_homes
from cluster.balance.shares import plan_shares
from cluster.balance.types import EMPTY, Fleet, Floats, Ints
from cluster.placement import ExpertHost, ExpertShape, Placement, slots_per_layer
from workers.expert.types import Slot


def plan_rebalance(
    shape: ExpertShape,
    hosts: Sequence[ExpertHost],
    loads: Mapping[int, Floats],
    *,
    num_slots: int,
    previous: Placement,
) -> Placement:
    """The next placement: level under these loads, with few copies moved from the previous one.

    An expert that stays on a worker keeps its slot. The same arguments give the same placement.

    Args:
        shape: what there is to place.
        hosts: the workers to place it on, in the order of the placement.
        loads: MoE layer index -> (E,) rows of each expert, >= 0; a layer left out counts as level.
        num_slots: slots of each worker in each layer; 0 for just enough.
        previous: the placement in force; may name other workers than `hosts`.

    Raises:
        ConfigError: too few slots.
    """
    per_layer = slots_per_layer(shape.num_experts, len(hosts), num_slots)
    fleet = Fleet(num_slots=per_layer, domain_W=domains_of(hosts))
    previous_LWX = plan_of(shape, [host.worker_id for host in hosts], previous, num_slots=per_layer)
    plan_LWX = plan_homes(loads_of(shape, loads), fleet, previous_LWX=previous_LWX)
    return placement_of(shape, hosts, keep_slots(previous_LWX, plan_LWX))


def plan_rebalance_shares(
    shape: ExpertShape, placement: Placement, loads: Mapping[int, Floats]
) -> Mapping[str, tuple[float, ...]]:
    """Worker id -> the share of each of its slots, in the placement's order.

    Args:
        shape: what is placed.
        placement: holds every expert of every layer.
        loads: MoE layer index -> (E,) rows of each expert, >= 0; a layer left out counts as level.
    """
    num_slots = 1 + max(slot.slot_idx for slots in placement.values() for slot in slots)
    plan_LWX = plan_of(shape, list(placement), placement, num_slots=num_slots)
    share_LWX = plan_shares(loads_of(shape, loads), plan_LWX)
    place = {layer_idx: place for place, layer_idx in enumerate(shape.layer_ids)}
    return {
        worker_id: tuple(float(share_LWX[place[slot.layer_idx], worker, slot.slot_idx]) for slot in slots)
        for worker, (worker_id, slots) in enumerate(placement.items())
    }


def domains_of(hosts: Sequence[ExpertHost]) -> Ints:
    """(W,) failure domains at the widest level at which the workers differ: zones, else racks, else hosts."""
    depth = min((len(host.failure_domain) for host in hosts), default=0)
    for width in range(1, depth + 1):
        prefixes = [host.failure_domain[:width] for host in hosts]
        numbers = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefixes))}
        if len(numbers) > 1:
            return np.array([numbers[prefix] for prefix in prefixes])
    return np.arange(len(hosts))


def loads_of(shape: ExpertShape, loads: Mapping[int, Floats]) -> Floats:
    """(L, E) loads of the layers in the shape's order."""
    level_E = np.ones(shape.num_experts)
    return np.stack([np.asarray(loads.get(layer_idx, level_E), float) for layer_idx in shape.layer_ids])


def plan_of(shape: ExpertShape, worker_ids: Sequence[str], placement: Placement, *, num_slots: int) -> Ints:
    """(L, W, X) the expert in every slot of these workers, -1 in an empty one.

    A slot beyond `num_slots` comes into a free one, or is left out where its worker has none.
    """
    place = {layer_idx: place for place, layer_idx in enumerate(shape.layer_ids)}
    plan_LWX = np.full((len(place), len(worker_ids), num_slots), EMPTY)
    for worker, worker_id in enumerate(worker_ids):
        beyond = []
        for slot in placement.get(worker_id, ()):
            if slot.slot_idx < num_slots:
                plan_LWX[place[slot.layer_idx], worker, slot.slot_idx] = slot.expert_idx
            else:
                beyond.append(slot)
        for slot in beyond:
            free = np.flatnonzero(plan_LWX[place[slot.layer_idx], worker] == EMPTY)
            if len(free):
                plan_LWX[place[slot.layer_idx], worker, free[0]] = slot.expert_idx
    return plan_LWX


def keep_slots(previous_LWX: Ints, plan_LWX: Ints) -> Ints:
    """(L, W, X) the plan with every expert that a worker held before in the slot where it was."""
    is_same = (plan_LWX[..., :, None] == previous_LWX[..., None, :]) & (plan_LWX != EMPTY)[..., None]
    is_kept, is_new = is_same.any(axis=-2), ~is_same.any(axis=-1) & (plan_LWX != EMPTY)
    kept_LWX = np.where(is_kept, previous_LWX, EMPTY)
    # The k-th expert that is new to a worker comes into its k-th slot that is not kept.
    new_first, free_first = (
        np.argsort(~is_new, axis=-1, kind="stable"),
        np.argsort(is_kept, axis=-1, kind="stable"),
    )
    new_LWX = np.take_along_axis(np.where(is_new, plan_LWX, EMPTY), new_first, axis=-1)
    was_LWX = np.take_along_axis(kept_LWX, free_first, axis=-1)
    np.put_along_axis(kept_LWX, free_first, np.where(was_LWX == EMPTY, new_LWX, was_LWX), axis=-1)
    return kept_LWX


def placement_of(shape: ExpertShape, hosts: Sequence[ExpertHost], plan_LWX: Ints) -> Placement:
    """The placement of a plan."""
    return {
        host.worker_id: tuple(
            Slot(layer_idx, slot_idx, expert_idx)
            for layer_idx, expert_X in zip(shape.layer_ids, plan_LWX[:, worker].tolist(), strict=True)
            for slot_idx, expert_idx in enumerate(expert_X)
            if expert_idx != EMPTY
        )
        for worker, host in enumerate(hosts)
    }
