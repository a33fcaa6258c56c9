"""Copies that a plan can spare, given up to make room for experts that lack replicas.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, A copies of all layers.
"""

import numpy as np

from cluster.balance.measure import count_replicas, worker_loads
from cluster.balance.types import EMPTY, Floats, Ints


def make_room(loads_LE: Floats, plan_LWX: Ints, need_LE: Ints) -> tuple[Ints, Ints]:
    """The plan without the copies that must go so that every expert can have the replicas it needs.

    Worked example: loads 8, 2, 2 with replicas 2, 2, 0 in four full slots, one needed of each. One must go;
    an expert with load 8 would have replicas of 8 then, one with load 2 replicas of 2: so a copy of the
    second goes.

    Args:
        loads_LE: (L, E) load of every expert.
        plan_LWX: (L, W, X) the plan; slots may be empty.
        need_LE: (L, E) replicas needed; not more over all experts than there are slots.

    Returns:
        (L, W, X) the plan with room, and (L, E) the replicas to fill it to.
    """
    had_LE = count_replicas(plan_LWX, loads_LE.shape[1])
    kept_LE = had_LE.copy()
    num_empty_L = (plan_LWX == EMPTY).sum(axis=(1, 2))
    num_leaving_L = np.maximum(need_LE - had_LE, 0).sum(axis=1) - num_empty_L
    after_LE = np.where(kept_LE > need_LE, loads_LE / np.maximum(kept_LE - 1, 1), np.inf)
    for step in range(int(num_leaving_L.max(initial=0))):
        layers = np.flatnonzero(num_leaving_L > step)
        expert_L = after_LE.argmin(axis=1)[layers]
        left_L = kept_LE[layers, expert_L] - 1
        kept_LE[layers, expert_L] = left_L
        after_L = loads_LE[layers, expert_L] / np.maximum(left_L - 1, 1)
        after_LE[layers, expert_L] = np.where(left_L > need_LE[layers, expert_L], after_L, np.inf)
    room_LWX = drop_copies(plan_LWX, had_LE - kept_LE, worker_loads(loads_LE, plan_LWX))
    return room_LWX, np.maximum(kept_LE, need_LE)


def drop_copies(plan_LWX: Ints, num_LE: Ints, load_LW: Floats) -> Ints:
    """(L, W, X) the plan without so many copies of each expert, those of the most loaded workers."""
    plan_LWX = plan_LWX.copy()
    layers = np.arange(len(plan_LWX))[:, None, None]
    is_touched_LWX = (num_LE > 0)[layers, np.maximum(plan_LWX, 0)] & (plan_LWX != EMPTY)
    layer_A, worker_A, slot_A = np.nonzero(is_touched_LWX)
    expert_A = plan_LWX[layer_A, worker_A, slot_A]
    order_A = np.lexsort((-load_LW[layer_A, worker_A], expert_A, layer_A))
    key_A = (layer_A * num_LE.shape[1] + expert_A)[order_A]
    rank_A = np.arange(len(key_A)) - np.searchsorted(key_A, key_A)
    dropped = order_A[rank_A < num_LE.ravel()[key_A]]
    plan_LWX[layer_A[dropped], worker_A[dropped], slot_A[dropped]] = EMPTY
    return plan_LWX
