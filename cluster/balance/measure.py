"""How good a plan is: loads of workers, balance, and copies that move.

Worked example: experts 0 and 1 with loads 6 and 2; worker 0 holds expert 0, worker 1 holds experts 0 and 1.
The replicas of expert 0 take 3 rows each, so the workers carry 3 and 5: balance 4 / 5 = 0.8.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

import numpy as np

from cluster.balance.types import EMPTY, Floats, Ints


def count_replicas(plan_LWX: Ints, num_experts: int) -> Ints:
    """(L, E) replicas of every expert."""
    num_layers = len(plan_LWX)
    keys = plan_LWX + np.arange(num_layers)[:, None, None] * num_experts
    counts = np.bincount(keys[plan_LWX != EMPTY], minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts).astype(np.int64, copy=False)


def replica_loads(loads_LE: Floats, plan_LWX: Ints) -> Floats:
    """(L, W, X) load of what is in every slot, an expert's load split evenly; 0 in an empty slot."""
    per_replica_LE = loads_LE / np.maximum(count_replicas(plan_LWX, loads_LE.shape[1]), 1)
    taken = np.take_along_axis(per_replica_LE[:, None], np.maximum(plan_LWX, 0), axis=2)
    return np.where(plan_LWX == EMPTY, 0.0, taken)


def worker_loads(loads_LE: Floats, plan_LWX: Ints) -> Floats:
    """(L, W) load of every worker."""
    load_LW: Floats = replica_loads(loads_LE, plan_LWX).sum(axis=2)
    return load_LW


def balance_of(load_LW: Floats) -> Floats:
    """(L,) mean over max load of the workers, (0, 1]; 1 where there is no load."""
    most = load_LW.max(axis=1)
    balance_L: Floats = np.where(most > 0, load_LW.mean(axis=1) / np.where(most > 0, most, 1.0), 1.0)
    return balance_L


def levelness(load_LW: Floats) -> dict[str, float]:
    """`balance_of` as reports give it: the mean over the layers, and the worst of them."""
    balance_L = balance_of(load_LW)
    return {"mean": float(balance_L.mean()), "worst_layer": float(balance_L.min())}


def count_moves(old_LWX: Ints, new_LWX: Ints, num_experts: int) -> int:
    """Copies that some worker must receive: what it holds in `new` and not in `old`.

    The order of a worker's slots is free.
    """
    return int(np.maximum(count_held(new_LWX, num_experts) - count_held(old_LWX, num_experts), 0).sum())


def count_held(plan_LWX: Ints, num_experts: int) -> Ints:
    """(L, W, E) copies of every expert in every worker."""
    num_layers, num_workers, _ = plan_LWX.shape
    holder = np.arange(num_layers * num_workers).reshape(num_layers, num_workers, 1) * num_experts
    held = np.bincount(
        (plan_LWX + holder)[plan_LWX != EMPTY], minlength=num_layers * num_workers * num_experts
    )
    return held.reshape(num_layers, num_workers, num_experts).astype(np.int64, copy=False)
