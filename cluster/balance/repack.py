"""A way out where single exchanges gain nothing: some workers are emptied and filled again.

In every worker that takes part, the heaviest replica stays if it is one of the W heaviest of its layer; the
rest is taken out and put back, the heaviest first. Those above the limit take part, and with them those
that hold the lightest replicas, which are what a heavy replica needs beside it. More of them take part
until the limit is kept; when all do, the outcome is that of a plan from scratch.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

import numpy as np

from cluster.balance.fill import fill_slots
from cluster.balance.measure import count_replicas, replica_loads, worker_loads
from cluster.balance.spare import drop_copies
from cluster.balance.types import EMPTY, Fleet, Floats, Ints


def adopt_counts(loads_LE: Floats, plan_LWX: Ints, count_LE: Ints, fleet: Fleet) -> Ints:
    """(L, W, X) the plan with other numbers of replicas, and as little else changed as can be."""
    surplus_LE = np.maximum(count_replicas(plan_LWX, loads_LE.shape[1]) - count_LE, 0)
    room_LWX = drop_copies(plan_LWX, surplus_LE, worker_loads(loads_LE, plan_LWX))
    return fill_slots(loads_LE, room_LWX, count_LE, fleet)


def repack(loads_LE: Floats, plan_LWX: Ints, limit_L: Floats, num_more_L: Ints, fleet: Fleet) -> Ints:
    """(L, W, X) the plan with some workers filled anew.

    Args:
        loads_LE: (L, E) loads, divided by their layer's mean.
        plan_LWX: (L, W, X) a full plan with the replicas it should have.
        limit_L: (L,) load above which a worker takes part.
        num_more_L: (L,) workers that take part besides, those with the lightest replicas.
        fleet: the workers.
    """
    num_workers, num_slots = plan_LWX.shape[1:]
    replica_LWX = replica_loads(loads_LE, plan_LWX)
    rank_LW = replica_LWX.min(axis=2).argsort(axis=1, kind="stable").argsort(axis=1)
    is_open_LW = (replica_LWX.sum(axis=2) > limit_L[:, None]) | (rank_LW < num_more_L[:, None])
    heavy_L = np.sort(replica_LWX.reshape(len(plan_LWX), -1), axis=1)[:, -num_workers]
    is_heaviest_LWX = np.arange(num_slots) == replica_LWX.argmax(axis=2)[:, :, None]
    stays_LWX = is_heaviest_LWX & (replica_LWX >= heavy_L[:, None, None])
    room_LWX = np.where(is_open_LW[:, :, None] & ~stays_LWX, EMPTY, plan_LWX)
    return fill_slots(loads_LE, room_LWX, count_replicas(plan_LWX, loads_LE.shape[1]), fleet)
