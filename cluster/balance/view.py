"""The layers that are still above their target, gathered for the search of a step.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, R rows here: layers
above their target.
"""

from dataclasses import dataclass

import numpy as np

from cluster.balance.types import Floats, Ints

TIE = 1e-4
"""Weight of a changed worker's load after a step: of equal gains the one that leaves most room wins."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Some layers as they are now. The hot worker is the most loaded one of its layer."""

    layer_R: Ints
    """(R,) index of each layer in the plan."""
    plan_RWX: Ints
    replica_RWX: Floats
    """(R, W, X) load of what is in every slot."""
    load_RW: Floats
    target_R: Floats
    hot_R: Ints
    """(R,) the hot worker."""
    hot_load_R: Floats
    hot_expert_RX: Ints
    hot_replica_RX: Floats

    def over(self, load: Floats) -> Floats:
        """(R, ...) what loads (R, ...) have above their layers' targets."""
        target = self.target_R.reshape((-1,) + (1,) * (load.ndim - 1))
        over: Floats = np.maximum(load - target, 0.0)
        return over


@dataclass(frozen=True)
class Choice:
    """The best step of one kind in every row."""

    gain_R: Floats
    """(R,) load above the target that it takes away, per copy moved; -inf where there is no step."""
    hot_slot_R: Ints
    """(R,) slot of the hot worker whose expert is given away or copied."""
    worker_R: Ints
    """(R,) the other worker."""
    slot_R: Ints
    """(R,) slot of the other worker whose expert comes back or is given up."""


def look_at(loads_LE: Floats, plan_LWX: Ints, count_LE: Ints, layer_R: Ints, target_L: Floats) -> View:
    """The view of those of some layers that are above their target."""
    plan_RWX = plan_LWX[layer_R]
    replica_RE = loads_LE[layer_R] / count_LE[layer_R]
    replica_RWX = replica_RE[np.arange(len(layer_R))[:, None, None], plan_RWX]
    load_RW = replica_RWX.sum(axis=2)
    kept = np.flatnonzero(load_RW.max(axis=1) > target_L[layer_R] * (1 + 1e-12))
    rows, hot_R = np.arange(len(kept)), load_RW[kept].argmax(axis=1)
    return View(
        layer_R=layer_R[kept],
        plan_RWX=plan_RWX[kept],
        replica_RWX=replica_RWX[kept],
        load_RW=load_RW[kept],
        target_R=target_L[layer_R[kept]],
        hot_R=hot_R,
        hot_load_R=load_RW[kept][rows, hot_R],
        hot_expert_RX=plan_RWX[kept][rows, hot_R],
        hot_replica_RX=replica_RWX[kept][rows, hot_R],
    )


def choose(gain_RXWX: Floats, after_RXWX: Floats) -> Choice:
    """The step of largest gain in every row.

    Args:
        gain_RXWX: gain of the step (hot slot, other worker, its slot); -inf where it is not allowed.
        after_RXWX: load that the heavier of the changed workers has after it.
    """
    num_rows = len(gain_RXWX)
    best_R = (gain_RXWX - TIE * after_RXWX).reshape(num_rows, -1).argmax(axis=1)
    hot_slot_R, worker_R, slot_R = np.unravel_index(best_R, gain_RXWX.shape[1:])
    return Choice(gain_RXWX.reshape(num_rows, -1)[np.arange(num_rows), best_R], hot_slot_R, worker_R, slot_R)
