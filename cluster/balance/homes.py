"""Where every replica lives: a plan from nothing, or few changes that make the one in force good again.

Objectives in order: the most loaded worker carries as little as in a plan from scratch, or less; few copies
move. Never twice on one worker while another has none, and in another failure domain where there is one
with room.

Worked example: loads 9, 4, 2 on three workers of two slots: replicas 3, 2, 1. From nothing, every worker
gets a copy of expert 0; the copies of expert 1 go to workers 0 and 1, expert 2 to worker 2: all carry 5.
With loads 9, 2, 4 next, worker 2 carries 7 and the others 4. Expert 2 gets a replica in the place of one of
expert 1: one copy moves and all carry 5 again.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

import numpy as np

from cluster.balance.change import Goal, change
from cluster.balance.fill import fill_slots
from cluster.balance.measure import count_replicas
from cluster.balance.refine import refine
from cluster.balance.replicas import needed_replicas, plan_replicas
from cluster.balance.scratch import Sketch, plan_from_scratch
from cluster.balance.spare import make_room
from cluster.balance.twins import mark_twins
from cluster.balance.types import EMPTY, Fleet, Floats, Ints

FIRST_AIM = 0.1
"""What a first plan may keep of the distance that a plan from scratch has to perfect balance."""
NEXT_AIM = 0.5
"""The same for a plan that follows another, where every step costs copies."""


def plan_homes(loads_LE: Floats, fleet: Fleet, *, previous_LWX: Ints | None = None) -> Ints:
    """(L, W, X) the expert in every slot; -1 only where a worker has more slots than there are experts.

    Args:
        loads_LE: (L, E) load of every expert, >= 0.
        fleet: the workers; their slots hold every expert at least once.
        previous_LWX: (L, W, X) the plan in force; slots may be empty and experts missing. None for none.
    """
    loads_LE = normalise(loads_LE)
    if fleet.num_slots >= loads_LE.shape[1]:
        return mend(loads_LE, _or_empty(previous_LWX, loads_LE, fleet), fleet)  # all hold everything
    mean_L = loads_LE.sum(axis=1) / fleet.num_workers
    if previous_LWX is None:
        sketch = plan_from_scratch(loads_LE, fleet)
        return level(loads_LE, sketch, mean_L + (sketch.most_L - mean_L) * FIRST_AIM, fleet)
    mended_LWX = mend(loads_LE, previous_LWX, fleet)
    if fleet.num_slots == 1:
        return replace_single(loads_LE, mended_LWX, fleet)
    sketch = plan_from_scratch(loads_LE, fleet)
    aim_L = mean_L + (sketch.most_L - mean_L) * NEXT_AIM
    return change(loads_LE, mended_LWX, sketch, Goal(sketch.most_L, aim_L), fleet)


def _or_empty(plan_LWX: Ints | None, loads_LE: Floats, fleet: Fleet) -> Ints:
    shape = (len(loads_LE), fleet.num_workers, fleet.num_slots)
    return np.full(shape, EMPTY) if plan_LWX is None else plan_LWX


def normalise(loads_LE: Floats) -> Floats:
    """(L, E) loads with mean 1 in every layer; a layer without load counts as level."""
    mean_L1 = loads_LE.mean(axis=1, keepdims=True)
    level_LE = np.where(mean_L1 > 0, loads_LE / np.where(mean_L1 > 0, mean_L1, 1.0), 1.0)
    return np.maximum(level_LE, 1e-9)


def mend(loads_LE: Floats, plan_LWX: Ints, fleet: Fleet) -> Ints:
    """(L, W, X) the plan with every expert in it, no empty slot, and none twice on one worker."""
    plan_LWX = np.where(mark_twins(plan_LWX), EMPTY, plan_LWX)
    if (plan_LWX != EMPTY).all() and (count_replicas(plan_LWX, loads_LE.shape[1]) > 0).all():
        return plan_LWX
    room_LWX, count_LE = make_room(loads_LE, plan_LWX, np.ones(loads_LE.shape, dtype=np.int64))
    num_slots = fleet.num_workers * fleet.num_slots
    count_LE = plan_replicas(loads_LE, num_slots, most=fleet.num_workers, least_LE=count_LE)
    return fill_slots(loads_LE, room_LWX, count_LE, fleet)


def replace_single(loads_LE: Floats, plan_LWX: Ints, fleet: Fleet) -> Ints:
    """(L, W, 1) the plan of workers with one slot, changed where an expert lacks replicas."""
    count_LE = plan_replicas(loads_LE, fleet.num_workers, most=fleet.num_workers)
    limit_L = (loads_LE / count_LE).max(axis=1)
    room_LWX, count_LE = make_room(loads_LE, plan_LWX, needed_replicas(loads_LE, limit_L))
    return fill_slots(loads_LE, room_LWX, count_LE, fleet)


def level(loads_LE: Floats, sketch: Sketch, aim_L: Floats, fleet: Fleet) -> Ints:
    """(L, W, X) a plan from scratch, levelled as far as it goes."""
    if fleet.num_slots == 1:
        return sketch.plan_LWX  # any two exchanged leave the loads as they are
    return refine(loads_LE, sketch.plan_LWX, aim_L, fleet)
