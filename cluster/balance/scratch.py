"""Plans that begin with empty workers: replicas for the heaviest experts, then the heaviest replica first.

This is the greedy of DeepSeek's EPLB with failure domains, tried with several ways to count replicas: a
worker that holds a heavy replica holds light ones too, so it can pay to count only what an expert has above
the light ones. Every layer takes the counts that serve it best.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.

Source: https://github.com/deepseek-ai/EPLB, the algorithm as its README describes it.
"""

from dataclasses import dataclass

import numpy as np

from cluster.balance.fill import fill_slots
from cluster.balance.measure import worker_loads
from cluster.balance.replicas import plan_replicas
from cluster.balance.types import EMPTY, Fleet, Floats, Ints

LEFT_OUT = (0.05, 0.1, 0.2)
"""Parts of the mean load that are left out of every expert's load when replicas are counted."""


@dataclass(frozen=True)
class Sketch:
    """A plan from nothing."""

    plan_LWX: Ints
    count_LE: Ints
    most_L: Floats
    """(L,) load of the most loaded worker."""


def plan_from_scratch(loads_LE: Floats, fleet: Fleet) -> Sketch:
    """The best of the plans that begin with empty workers.

    Args:
        loads_LE: (L, E) loads, divided by their layer's mean, > 0.
        fleet: the workers; their slots hold every expert at least once.
    """
    num_slots = fleet.num_workers * fleet.num_slots
    count_LE = plan_replicas(loads_LE, num_slots, most=fleet.num_workers)
    best = _sketch(loads_LE, count_LE, fleet)
    if fleet.num_slots == 1:
        return best  # nothing stands beside a replica: the first counts are the best
    for left_out in LEFT_OUT:
        counted_LE = np.maximum(loads_LE - left_out, loads_LE * 1e-3)
        count_LE = plan_replicas(counted_LE, num_slots, most=fleet.num_workers)
        best = _better(best, _sketch(loads_LE, count_LE, fleet))
    half = fleet.num_workers // 2
    if num_slots <= half * loads_LE.shape[1] and (best.count_LE > half).any():
        best = _better(best, _sketch(loads_LE, plan_replicas(loads_LE, num_slots, most=half), fleet))
    return best


def _sketch(loads_LE: Floats, count_LE: Ints, fleet: Fleet) -> Sketch:
    num_layers, num_experts = loads_LE.shape
    if fleet.num_slots == 1:
        # Workers differ by their domain only: copies of an expert go to one domain after the other.
        expert_LE = np.broadcast_to(np.arange(num_experts), count_LE.shape)
        plan_LWX = np.empty((num_layers, fleet.num_workers, 1), dtype=np.int64)
        plan_LWX[:, _domains_in_turn(fleet), 0] = np.repeat(expert_LE, count_LE.ravel()).reshape(
            num_layers, -1
        )
    else:
        empty_LWX = np.full((num_layers, fleet.num_workers, fleet.num_slots), EMPTY)
        plan_LWX = fill_slots(loads_LE, empty_LWX, count_LE, fleet)
    return Sketch(plan_LWX, count_LE, worker_loads(loads_LE, plan_LWX).max(axis=1))


def _domains_in_turn(fleet: Fleet) -> Ints:
    """(W,) the workers: one of every domain, then a second one of each, and so on."""
    by_domain = np.argsort(fleet.domain_W, kind="stable")
    domain_W = fleet.domain_W[by_domain]
    turn_W = np.arange(fleet.num_workers) - np.searchsorted(domain_W, domain_W)
    return by_domain[np.argsort(turn_W, kind="stable")]


def _better(one: Sketch, other: Sketch) -> Sketch:
    is_one_L = one.most_L <= other.most_L
    return Sketch(
        np.where(is_one_L[:, None, None], one.plan_LWX, other.plan_LWX),
        np.where(is_one_L[:, None], one.count_LE, other.count_LE),
        np.where(is_one_L, one.most_L, other.most_L),
    )
