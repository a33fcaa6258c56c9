"""The fewest copies moved that make a plan as good as one from scratch.

First single steps (refine.py). Layers that these leave above their limit take the replica counts of the
plan from scratch and are repacked, a few workers and then more, until the limit is kept.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, R rows here: layers not
done yet.
"""

from dataclasses import dataclass

import numpy as np

from cluster.balance.measure import worker_loads
from cluster.balance.refine import refine
from cluster.balance.repack import adopt_counts, repack
from cluster.balance.scratch import Sketch
from cluster.balance.types import Bools, Fleet, Floats, Ints

GROWTH = 1.5
"""How many more workers take part in every next try."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Goal:
    """What a worker may carry."""

    limit_L: Floats
    """(L,) more is not accepted, where a plan from scratch keeps it."""
    aim_L: Floats
    """(L,) levelling goes on down to this, at most `limit_L`."""

    def rows(self, rows_R: Ints) -> "Goal":
        """The goal of some layers."""
        return Goal(self.limit_L[rows_R], self.aim_L[rows_R])

    def is_met(self, loads_LE: Floats, plan_LWX: Ints) -> Bools:
        """(L,) whether no worker carries more than the limit."""
        most_L = worker_loads(loads_LE, plan_LWX).max(axis=1)
        is_met_L: Bools = most_L <= self.limit_L * (1 + ROUNDING)
        return is_met_L


def change(loads_LE: Floats, plan_LWX: Ints, sketch: Sketch, goal: Goal, fleet: Fleet) -> Ints:
    """(L, W, X) the plan, changed until the goal is met.

    Args:
        loads_LE: (L, E) loads, divided by their layer's mean.
        plan_LWX: (L, W, X) the plan in force, no slot empty.
        sketch: the plan from scratch for the same loads; what is left above the limit in the end takes it.
        goal: what a worker may carry.
        fleet: the workers.
    """
    changed_LWX = refine(loads_LE, plan_LWX, goal.aim_L, fleet)
    rows_R = np.flatnonzero(~goal.is_met(loads_LE, changed_LWX))
    if len(rows_R):
        counted_RWX = adopt_counts(loads_LE[rows_R], plan_LWX[rows_R], sketch.count_LE[rows_R], fleet)
        repacked_RWX = _repack_until_met(loads_LE[rows_R], counted_RWX, goal.rows(rows_R), fleet)
        is_met_R = goal.rows(rows_R).is_met(loads_LE[rows_R], repacked_RWX)
        changed_LWX[rows_R] = np.where(is_met_R[:, None, None], repacked_RWX, sketch.plan_LWX[rows_R])
    return changed_LWX


def _repack_until_met(loads_LE: Floats, counted_LWX: Ints, goal: Goal, fleet: Fleet) -> Ints:
    result_LWX = refine(loads_LE, counted_LWX, goal.aim_L, fleet)
    num_above_L = (worker_loads(loads_LE, counted_LWX) > goal.limit_L[:, None]).sum(axis=1)
    num_more_L = np.maximum(num_above_L / 2, 2.0)
    while num_more_L.max() < GROWTH * fleet.num_workers:
        rows_R = np.flatnonzero(~goal.is_met(loads_LE, result_LWX))
        if not len(rows_R):
            break
        repacked_RWX = repack(
            loads_LE[rows_R], counted_LWX[rows_R], goal.limit_L[rows_R], num_more_L[rows_R], fleet
        )
        result_LWX[rows_R] = refine(loads_LE[rows_R], repacked_RWX, goal.aim_L[rows_R], fleet)
        num_more_L = num_more_L * GROWTH
    return result_LWX
