"""A kind of step: an expert of the hot worker gets another replica elsewhere. One copy moves.

It takes the slot of a copy that its expert can spare. All replicas of the first expert get lighter, those
left of the second heavier. Worked example: loads 8 and 2 with one replica of the first on worker 0 and two
of the second on workers 1 and 2. The first gets the slot on worker 2: the workers carry 4, 2 and 4 instead
of 8, 1 and 1.

Letters: E logical experts, W workers, X slots of one worker in one layer, R rows here: layers above their
target.
"""

import numpy as np

from cluster.balance.others import eased_by_more, lost_by_less
from cluster.balance.state import Copies
from cluster.balance.types import Bools, Floats, Ints
from cluster.balance.view import Choice, View, choose


def best_replica(view: View, copies: Copies, loads_LE: Floats, count_LE: Ints) -> Choice:
    """The new replica of every row that gains most; none makes another worker the new most loaded one.

    What other holders of the two experts gain and lose is added up as if no worker held both, which counts
    no gain too high.
    """
    load_RE, count_RE = loads_LE[view.layer_R], count_LE[view.layer_R]
    hot_at = (np.arange(len(view.layer_R))[:, None], view.hot_expert_RX)
    new_RX = load_RE[hot_at] / (count_RE[hot_at] + 1)
    after_RXWX = view.load_RW[:, None, :, None] - view.replica_RWX[:, None] + new_RX[:, :, None, None]
    here_RXWX = view.over(view.load_RW)[:, None, :, None] - view.over(after_RXWX)
    eased_RX = eased_by_more(view, load_RE, count_RE)[hot_at]
    lost_RWX, is_spare_RWX = lost_by_less(view, load_RE, count_RE)
    is_lower_RXWX = after_RXWX < view.hot_load_R[:, None, None, None]
    may_come_RXW = _may_come(view, copies)
    is_allowed_RXWX = is_lower_RXWX & is_spare_RWX[:, None] & may_come_RXW[:, :, :, None]
    gain_RXWX = here_RXWX + eased_RX[:, :, None, None] - lost_RWX[:, None]
    return choose(np.where(is_allowed_RXWX, gain_RXWX, -np.inf), after_RXWX)


def _may_come(view: View, copies: Copies) -> Bools:
    """(R, X, W) whether a worker may take a replica: it has none, nor its domain while others lack one."""
    at = (view.layer_R[:, None], view.hot_expert_RX)
    has_RXW: Bools = copies.by_worker_LEW[at] > 0
    has_RXZ: Bools = copies.by_domain_LEZ[at] > 0
    is_near_RXW: Bools = np.take(has_RXZ, copies.fleet.domain_W, axis=2)
    may_come: Bools = ~has_RXW & (~is_near_RXW | has_RXZ.all(axis=2, keepdims=True))
    return may_come
