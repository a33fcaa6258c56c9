"""How an expert's rows split over its replicas: as water fills a vessel with steps in its floor.

Worked example: worker 0 holds experts 0 and 1, worker 1 holds expert 0; loads 6 and 4. Even shares of
expert 0 make the workers carry 7 and 3. Its 6 rows poured over floors of 4 and 0 rise to 5: shares 1/6 and
5/6, both carry 5.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, M replicas of the
experts that a step is about.
"""

import numpy as np

from cluster.balance.measure import count_replicas, replica_loads
from cluster.balance.types import EMPTY, Floats, Ints

LEAST_OF_EVEN = 0.05
"""A replica takes at least this part of an even share: it stays warm, and its load stays known."""


def plan_shares(loads_LE: Floats, plan_LWX: Ints, *, num_sweeps: int = 4) -> Floats:
    """(L, W, X) part of its expert's rows that every slot takes, > 0; 0 in an empty slot.

    The shares of an expert sum to 1. No sweep makes the most loaded worker of a layer carry more than even
    shares do.

    Args:
        loads_LE: (L, E) load of every expert, >= 0.
        plan_LWX: (L, W, X) the expert in every slot; every expert is in one.
        num_sweeps: times that every expert with several replicas is poured again.
    """
    count_LE = count_replicas(plan_LWX, loads_LE.shape[1])
    layers = np.arange(len(plan_LWX))[:, None, None]
    share_LWX = np.where(plan_LWX == EMPTY, 0.0, 1 / count_LE[layers, np.maximum(plan_LWX, 0)])
    load_LW = replica_loads(loads_LE, plan_LWX).sum(axis=2)
    for _ in range(num_sweeps):
        for layer_idx in range(len(plan_LWX)):
            _sweep(loads_LE[layer_idx], plan_LWX[layer_idx], share_LWX[layer_idx], load_LW[layer_idx])
    return share_LWX


def _sweep(load_E: Floats, plan_WX: Ints, share_WX: Floats, load_W: Floats) -> None:
    """Pours every expert of one layer again, the heaviest first; changes shares and worker loads."""
    order = np.argsort(plan_WX, axis=None, kind="stable")
    experts = plan_WX.ravel()[order]
    firsts = np.searchsorted(experts, np.arange(len(load_E)))
    ends = np.searchsorted(experts, np.arange(len(load_E)), side="right")
    several = np.flatnonzero((ends - firsts > 1) & (load_E > 0))
    for expert in several[np.argsort(-load_E[several], kind="stable")]:
        slot_M = order[firsts[expert] : ends[expert]]
        worker_M = slot_M // plan_WX.shape[1]
        floor_M = load_W[worker_M] - share_WX.flat[slot_M] * load_E[expert]
        share_M = _pour(floor_M, float(load_E[expert]))
        load_W[worker_M] = floor_M + share_M * load_E[expert]
        share_WX.flat[slot_M] = share_M


def _pour(floor_M: Floats, load: float) -> Floats:
    """(M,) shares that make floor + share * load as level as they can be, each at least the least."""
    least = LEAST_OF_EVEN / len(floor_M)
    poured = load * (1 - LEAST_OF_EVEN)
    floor_M = floor_M + least * load
    sorted_M = np.sort(floor_M)
    # The water stands over the k lowest floors at (poured + their sum) / k, the lowest such level.
    level_M = (poured + np.cumsum(sorted_M)) / np.arange(1, len(floor_M) + 1)
    share_M = least + np.maximum(level_M.min() - floor_M, 0.0) / load
    whole_M: Floats = share_M / share_M.sum()
    return whole_M
