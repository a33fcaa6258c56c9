"""A kind of step: the hot worker gives up a copy for a replica of another expert. One copy moves.

Worked example: loads 10 and 2, two workers of two slots: worker 0 holds experts 0 and 1, worker 1 experts 0
and 2 with load 4, a third worker expert 0 and 1. All carry 10 / 3 of expert 0, so 4.3, 7.3 and 4.3. Worker
1 gives up its copy for one of expert 1: experts 0 and 1 carry 5 and 2 / 3 a replica, and the workers 5.7,
4.7 and 5.7.

Letters: E logical experts, W workers, X slots of one worker in one layer, R rows here: layers above their
target.
"""

import numpy as np

from cluster.balance.others import eased_by_more, lost_by_less
from cluster.balance.state import Copies
from cluster.balance.types import Bools, Floats, Ints
from cluster.balance.view import TIE, Choice, View


def best_instead(view: View, copies: Copies, loads_LE: Floats, count_LE: Ints) -> tuple[Choice, Ints]:
    """The step of every row that gains most, and the expert that comes; none makes another worker hotter.

    The choice's worker and slot are the hot ones themselves.
    """
    load_RE, count_RE = loads_LE[view.layer_R], count_LE[view.layer_R]
    rows = np.arange(len(view.layer_R))
    lost_RWX, is_spare_RWX = lost_by_less(view, load_RE, count_RE)
    new_RE = load_RE / (count_RE + 1)
    after_RXE = (view.hot_load_R[:, None] - view.hot_replica_RX)[:, :, None] + new_RE[:, None]
    here_RXE = view.over(view.hot_load_R)[:, None, None] - view.over(after_RXE)
    gain_RXE = (
        here_RXE + eased_by_more(view, load_RE, count_RE)[:, None] - lost_RWX[rows, view.hot_R][:, :, None]
    )
    is_lower_RXE = after_RXE < view.hot_load_R[:, None, None]
    is_allowed_RXE = (
        is_lower_RXE & is_spare_RWX[rows, view.hot_R][:, :, None] & _may_come(view, copies)[:, None]
    )
    gain_RXE = np.where(is_allowed_RXE, gain_RXE, -np.inf)
    best_R = (gain_RXE - TIE * after_RXE).reshape(len(rows), -1).argmax(axis=1)
    slot_R, expert_R = np.unravel_index(best_R, gain_RXE.shape[1:])
    return Choice(gain_RXE[rows, slot_R, expert_R], slot_R, view.hot_R, slot_R), expert_R


def _may_come(view: View, copies: Copies) -> Bools:
    """(R, E) whether the hot worker may take one: it has none, nor its domain while another lacks one."""
    has_RE: Bools = copies.by_worker_LEW[view.layer_R, :, view.hot_R] > 0
    has_REZ: Bools = copies.by_domain_LEZ[view.layer_R] > 0
    is_near_RE = has_REZ[np.arange(len(view.layer_R)), :, copies.fleet.domain_W[view.hot_R]]
    may_come: Bools = ~has_RE & (~is_near_RE | has_REZ.all(axis=2))
    return may_come
