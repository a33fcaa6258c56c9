"""Levels a plan step by step, each step the one that gains most per copy moved.

A step takes load off the most loaded worker of a layer, in one of two ways: it exchanges one of its experts
for a lighter one of another worker (exchange.py, two copies move), or it gives one of its experts another
replica in the place of a copy that its expert can spare (another.py, one copy moves). What a step gains is
the load above the layer's target that it takes away, over all workers. Steps go on until no worker is above
the target, or none gains.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, R rows here: layers not
done yet.
"""

import numpy as np

from cluster.balance.another import best_replica
from cluster.balance.exchange import best_exchange
from cluster.balance.instead import best_instead
from cluster.balance.measure import count_replicas
from cluster.balance.state import Copies
from cluster.balance.types import Bools, Fleet, Floats, Ints
from cluster.balance.view import Choice, View, look_at

SMALLEST_GAIN = 1e-9
NO_STEP = -1
STEPS_PER_WORKER = 4
"""Steps in a layer for each of its workers, at most; most layers need less than one."""


def refine(loads_LE: Floats, plan_LWX: Ints, target_L: Floats, fleet: Fleet) -> Ints:
    """(L, W, X) the plan, changed until no worker carries more than its layer's target, or no step gains.

    Args:
        loads_LE: (L, E) loads, divided by their layer's mean.
        plan_LWX: (L, W, X) a plan without empty slots.
        target_L: (L,) load of a worker that is low enough.
        fleet: the workers.
    """
    plan_LWX = plan_LWX.copy()
    count_LE = count_replicas(plan_LWX, loads_LE.shape[1])
    copies = Copies.of(plan_LWX, fleet, num_experts=loads_LE.shape[1])
    layer_R = np.arange(len(plan_LWX))
    for _ in range(STEPS_PER_WORKER * fleet.num_workers):
        view = look_at(loads_LE, plan_LWX, count_LE, layer_R, target_L)
        if not len(view.layer_R):
            break
        layer_R = view.layer_R[_step(loads_LE, plan_LWX, count_LE, copies, view)]
        count_LE[layer_R] = count_replicas(plan_LWX[layer_R], loads_LE.shape[1])
    return plan_LWX


def _step(loads_LE: Floats, plan_LWX: Ints, count_LE: Ints, copies: Copies, view: View) -> Bools:
    """Does the best step of every row; (R,) whether there was one that gains."""
    exchange, another = best_exchange(view, copies), best_replica(view, copies, loads_LE, count_LE)
    instead, expert_R = best_instead(view, copies, loads_LE, count_LE)
    gain_KR = np.stack([exchange.gain_R, another.gain_R, instead.gain_R])
    kind_R = np.where(gain_KR.max(axis=0) > SMALLEST_GAIN, gain_KR.argmax(axis=0), NO_STEP)
    _exchange(plan_LWX, copies, view, exchange, kind_R == 0)
    hot_expert_R = view.hot_expert_RX[np.arange(len(kind_R)), another.hot_slot_R]
    _replace(plan_LWX, copies, view, another, hot_expert_R, kind_R == 1)
    _replace(plan_LWX, copies, view, instead, expert_R, kind_R == 2)
    is_done_R: Bools = kind_R != NO_STEP
    return is_done_R


def _exchange(plan_LWX: Ints, copies: Copies, view: View, choice: Choice, is_done_R: Bools) -> None:
    hot = (view.layer_R[is_done_R], view.hot_R[is_done_R], choice.hot_slot_R[is_done_R])
    other = (view.layer_R[is_done_R], choice.worker_R[is_done_R], choice.slot_R[is_done_R])
    given, taken = plan_LWX[hot], plan_LWX[other]
    copies.replace(hot[0], hot[1], given, taken)
    copies.replace(other[0], other[1], taken, given)
    plan_LWX[hot], plan_LWX[other] = taken, given


def _replace(
    plan_LWX: Ints, copies: Copies, view: View, choice: Choice, expert_R: Ints, is_done_R: Bools
) -> None:
    slot = (view.layer_R[is_done_R], choice.worker_R[is_done_R], choice.slot_R[is_done_R])
    copies.replace(slot[0], slot[1], plan_LWX[slot], expert_R[is_done_R])
    plan_LWX[slot] = expert_R[is_done_R]
