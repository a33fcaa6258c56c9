"""How many replicas every expert gets.

Worked example: loads 9, 4, 2 and six slots. One replica each leaves three: they go to the expert whose
replicas are heaviest at the time, 9 (then 4.5 each), 4.5 (then 3) and 4 (then 2): replicas 3, 2, 1, and the
heaviest carries 3.

Letters: L layers, E logical experts.
"""

import numpy as np

from cluster.balance.types import Floats, Ints


def plan_replicas(loads_LE: Floats, num_slots: int, *, most: int, least_LE: Ints | None = None) -> Ints:
    """(L, E) replicas such that the heaviest is as light as can be.

    Args:
        loads_LE: (L, E) load of every expert, >= 0.
        num_slots: slots of a layer over all workers, >= E.
        most: replicas that one expert may have, the number of workers that can hold one each.
        least_LE: (L, E) replicas to begin from; None for one each.

    Returns:
        Replicas that sum to `num_slots` in every layer, or to `most` each where that is less.
    """
    count_LE = np.ones(loads_LE.shape, dtype=np.int64) if least_LE is None else np.maximum(least_LE, 1)
    num_spare_L = np.minimum(num_slots, most * loads_LE.shape[1]) - count_LE.sum(axis=1)
    replica_LE = np.where(count_LE < most, loads_LE / count_LE, -1.0)
    layers = np.arange(len(loads_LE))
    for step in range(int(num_spare_L.max(initial=0))):
        if num_spare_L[layers].min() <= step:
            layers = np.flatnonzero(num_spare_L > step)
        expert_L = replica_LE.argmax(axis=1)[layers]
        grown_L = count_LE[layers, expert_L] + 1
        count_LE[layers, expert_L] = grown_L
        replica_L = loads_LE[layers, expert_L] / grown_L
        replica_LE[layers, expert_L] = np.where(grown_L < most, replica_L, -1.0)
    return count_LE


def needed_replicas(loads_LE: Floats, limit_L: Floats) -> Ints:
    """(L, E) fewest replicas with which no replica is heavier than its layer's limit."""
    return np.maximum(np.ceil(loads_LE / limit_L[:, None] - 1e-9), 1).astype(np.int64)
