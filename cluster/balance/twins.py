"""No worker keeps an expert twice: filling the last slots can leave no other choice, an exchange later can.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, A twins of all layers.
"""

import numpy as np

from cluster.balance.types import EMPTY, Bools, Floats, Ints


def mark_twins(plan_LWX: Ints) -> Bools:
    """(L, W, X) slots whose expert an earlier slot of the same worker holds."""
    if plan_LWX.shape[2] == 1:
        return np.zeros(plan_LWX.shape, dtype=bool)
    is_earlier = np.tri(plan_LWX.shape[2], k=-1, dtype=bool)
    is_same = plan_LWX[..., :, None] == plan_LWX[..., None, :]
    is_twin_LWX: Bools = (is_same & is_earlier).any(axis=3) & (plan_LWX != EMPTY)
    return is_twin_LWX


def part_twins(replica_LE: Floats, plan_LWX: Ints) -> Ints:
    """(L, W, X) the plan without twins.

    A twin is exchanged for the copy nearest in load of a worker that has none of its expert; where no
    exchange goes, the heaviest expert that its own worker lacks takes its slot.

    Args:
        replica_LE: (L, E) load of one replica of every expert.
        plan_LWX: (L, W, X) a plan; workers have fewer slots than there are experts.
    """
    plan_LWX = plan_LWX.copy()
    for layer, worker, slot in zip(*np.nonzero(mark_twins(plan_LWX)), strict=True):
        _part(replica_LE[layer], plan_LWX[layer], int(worker), int(slot))
    return plan_LWX


def _part(replica_E: Floats, plan_WX: Ints, worker: int, slot: int) -> None:
    twin = plan_WX[worker, slot]
    may_come_E = np.ones(len(replica_E), dtype=bool)
    may_come_E[plan_WX[worker]] = False
    lacks_W = (plan_WX != twin).all(axis=1)
    is_open_WX = lacks_W[:, None] & may_come_E[plan_WX] & (plan_WX != EMPTY)
    if is_open_WX.any():
        distance_WX = np.where(is_open_WX, abs(replica_E[plan_WX] - replica_E[twin]), np.inf)
        other = np.unravel_index(distance_WX.argmin(), distance_WX.shape)
        plan_WX[worker, slot], plan_WX[other] = plan_WX[other], twin
    else:
        plan_WX[worker, slot] = np.where(may_come_E, replica_E, -np.inf).argmax()
