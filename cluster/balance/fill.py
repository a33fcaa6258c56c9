"""Where missing replicas go: the heaviest first, each to the lightest worker that may take it.

Worked example: loads 6, 4, 3, 1 and one replica each on two workers of two slots. 6 goes to worker 0, 4 to
worker 1, 3 to worker 1 (4 is less than 6), 1 to worker 0: both carry 7.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, Y missing replicas of a
layer, Z failure domains, A experts that lack some, of all layers, R rows here: layers that still lack some.
"""

import numpy as np

from cluster.balance.measure import count_replicas
from cluster.balance.twins import part_twins
from cluster.balance.types import EMPTY, Fleet, Floats, Ints

TWICE = 1e9
"""Handicap of a worker that holds the expert already; loads are about 1."""
SAME_DOMAIN = 1e6
"""Handicap of a worker for every copy in its failure domain."""


def fill_slots(loads_LE: Floats, plan_LWX: Ints, count_LE: Ints, fleet: Fleet) -> Ints:
    """(L, W, X) the plan with the replicas that it lacks of `count_LE` in its empty slots.

    Args:
        loads_LE: (L, E) loads, divided by their layer's mean.
        plan_LWX: (L, W, X) what stays where it is; an expert may not have more replicas than its count.
        count_LE: (L, E) replicas wanted; no more than there are slots.
        fleet: the workers.
    """
    plan_LWX = plan_LWX.copy()
    replica_LE = loads_LE / count_LE
    expert_LY = _heaviest_first(replica_LE, count_LE - count_replicas(plan_LWX, loads_LE.shape[1]))
    num_free_LW = (plan_LWX == EMPTY).sum(axis=2)
    open_W = np.flatnonzero((num_free_LW > 0).any(axis=0))  # only these are looked at
    load_LW = _loads_of(plan_LWX[:, open_W], replica_LE)
    load_LW[num_free_LW[:, open_W] == 0] = np.inf  # a full worker takes nothing
    for expert_L in expert_LY.T:
        layers = np.flatnonzero(expert_L != EMPTY)
        experts = expert_L[layers]
        cost_RW = load_LW[layers]
        if (count_LE[layers, experts] > 1).any():
            cost_RW = cost_RW + _handicaps(plan_LWX[layers], experts, open_W, fleet)
        places = cost_RW.argmin(axis=1)
        workers = open_W[places]
        slots = (plan_LWX[layers, workers] == EMPTY).argmax(axis=1)
        plan_LWX[layers, workers, slots] = experts
        num_free_LW[layers, workers] -= 1
        loaded_R = load_LW[layers, places] + replica_LE[layers, experts]
        load_LW[layers, places] = np.where(num_free_LW[layers, workers] > 0, loaded_R, np.inf)
    is_scarce = 1 < fleet.num_slots < loads_LE.shape[1]
    return part_twins(replica_LE, plan_LWX) if is_scarce else plan_LWX


def _handicaps(plan_RWX: Ints, expert_R: Ints, open_W: Ints, fleet: Fleet) -> Floats:
    """(R, W) what speaks against each open worker as the next home of an expert, 0 for nothing."""
    is_copy_RWX = plan_RWX == expert_R[:, None, None]
    rows, workers, _ = np.nonzero(is_copy_RWX)
    keys = rows * fleet.num_domains + fleet.domain_W[workers]
    near = np.bincount(keys, minlength=len(plan_RWX) * fleet.num_domains).reshape(len(plan_RWX), -1)
    handicap_RW: Floats = (near * SAME_DOMAIN)[:, fleet.domain_W[open_W]].astype(np.float64, copy=False)
    if fleet.num_slots > 1:  # with one slot an open worker holds nothing
        handicap_RW += TWICE * is_copy_RWX[:, open_W].any(axis=2)
    return handicap_RW


def _loads_of(plan_LWX: Ints, replica_LE: Floats) -> Floats:
    layers = np.arange(len(plan_LWX))[:, None, None]
    taken_LWX = replica_LE[layers, np.maximum(plan_LWX, 0)]
    load_LW: Floats = np.where(plan_LWX == EMPTY, 0.0, taken_LWX).sum(axis=2)
    return load_LW


def _heaviest_first(replica_LE: Floats, missing_LE: Ints) -> Ints:
    """(L, Y) the expert of every missing replica, heaviest first; -1 past a layer's last."""
    layer_A, expert_A = np.nonzero(missing_LE)
    order_A = np.lexsort((-replica_LE[layer_A, expert_A], layer_A))
    layer_A, expert_A = layer_A[order_A], expert_A[order_A]
    num_missing_L = missing_LE.sum(axis=1)
    expert_LY = np.full((len(replica_LE), int(num_missing_L.max(initial=0))), EMPTY)
    is_used_LY = np.arange(expert_LY.shape[1]) < num_missing_L[:, None]
    expert_LY[is_used_LY] = np.repeat(expert_A, missing_LE[layer_A, expert_A])
    return expert_LY
