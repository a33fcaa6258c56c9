"""One kind of step: the hot worker exchanges an expert for a lighter one of another worker. Two copies move.

Worked example: workers with loads 3 + 3 and 2 + 1, target 4.6. The hot one is 1.4 above it. Exchanging a 3
for the 2 leaves 5 and 4 (gain 1), for the 1 leaves 4 and 5 (gain 1.4 - 0.4 = 1): half of that for each copy
moved.

Letters: W workers, X slots of one worker in one layer, R rows here: layers above their target.
"""

import numpy as np

from cluster.balance.state import Copies
from cluster.balance.types import Bools, Ints
from cluster.balance.view import Choice, View, choose

COPIES_MOVED = 2


def best_exchange(view: View, copies: Copies) -> Choice:
    """The exchange of every row that gains most; none makes another worker the new most loaded one."""
    shift_RXWX = view.hot_replica_RX[:, :, None, None] - view.replica_RWX[:, None]
    hot_RXWX = view.hot_load_R[:, None, None, None] - shift_RXWX
    other_RXWX = view.load_RW[:, None, :, None] + shift_RXWX
    before_RW = view.over(view.load_RW) + view.over(view.hot_load_R)[:, None]
    gain_RXWX = before_RW[:, None, :, None] - view.over(hot_RXWX) - view.over(other_RXWX)
    is_lower_RXWX = (shift_RXWX > 0) & (other_RXWX < view.hot_load_R[:, None, None, None])
    gain_RXWX = np.where(is_lower_RXWX & _is_allowed(view, copies), gain_RXWX / COPIES_MOVED, -np.inf)
    return choose(gain_RXWX, np.maximum(hot_RXWX, other_RXWX))


def _is_allowed(view: View, copies: Copies) -> Bools:
    """(R, X, W, X) whether both copies may go where the exchange brings them."""
    layers = view.layer_R[:, None, None]
    hot = view.hot_R[:, None, None]
    worker_W = np.arange(view.load_RW.shape[1])
    may_go_RXW = _may_move(copies, layers, view.hot_expert_RX[:, :, None], hot, worker_W)
    may_come_RWX = _may_move(copies, layers, view.plan_RWX, worker_W[:, None], hot)
    allowed: Bools = may_go_RXW[:, :, :, None] & may_come_RWX[:, None]
    return allowed


def _may_move(copies: Copies, layers: Ints, expert: Ints, source: Ints, goal: Ints) -> Bools:
    """Whether a copy may go from one worker to another; all arguments broadcast.

    Not to a worker that holds the expert, and to a failure domain that holds it only from one that holds it
    twice.
    """
    from_domain, to_domain = copies.fleet.domain_W[source], copies.fleet.domain_W[goal]
    is_new = copies.by_worker_LEW[layers, expert, goal] == 0
    is_apart = copies.by_domain_LEZ[layers, expert, to_domain] == 0
    was_together = copies.by_domain_LEZ[layers, expert, from_domain] > 1
    allowed: Bools = is_new & (is_apart | was_together | (from_domain == to_domain))
    return allowed
