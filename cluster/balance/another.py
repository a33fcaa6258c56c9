"""The other kind of step: an expert of the hot worker gets another replica elsewhere. One copy moves.

It takes the slot of a copy that its expert can spare. All replicas of the first expert get lighter, those
left of the second heavier. Worked example: loads 8 and 2 with one replica of the first on worker 0 and two
of the second on workers 1 and 2. The first gets the slot on worker 2: the workers carry 4, 2 and 4 instead
of 8, 1 and 1.

Letters: E logical experts, W workers, X slots of one worker in one layer, R rows here: layers above their
target.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cluster.balance.state import Copies
from cluster.balance.types import Bools, Floats, Ints
from cluster.balance.view import Choice, View, choose

Number = TypeVar("Number", np.float64, np.int64)


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
    eased_RX = _eased(view, load_RE, count_RE)[hot_at]
    lost_RWX, is_spare_RWX = _lost(view, load_RE, count_RE)
    is_lower_RXWX = after_RXWX < view.hot_load_R[:, None, None, None]
    may_come_RXW = _may_come(view, copies)
    is_allowed_RXWX = is_lower_RXWX & is_spare_RWX[:, None] & may_come_RXW[:, :, :, None]
    gain_RXWX = here_RXWX + eased_RX[:, :, None, None] - lost_RWX[:, None]
    return choose(np.where(is_allowed_RXWX, gain_RXWX, -np.inf), after_RXWX)


def _eased(view: View, load_RE: Floats, count_RE: Ints) -> Floats:
    """(R, E) load above the target that one more replica of an expert takes off its holders."""
    lighter_RWX = _at_slots(view, load_RE / (count_RE * (count_RE + 1)))
    over_RW1 = view.over(view.load_RW)[:, :, None]
    eased_RWX = over_RW1 - view.over(view.load_RW[:, :, None] - lighter_RWX)
    return _sum_by_expert(view, eased_RWX, num_experts=load_RE.shape[1])


def _lost(view: View, load_RE: Floats, count_RE: Ints) -> tuple[Floats, Bools]:
    """(R, W, X) what other holders get above the target when a slot's copy goes; whether it can be spared."""
    num_experts = load_RE.shape[1]
    heavier_RE = load_RE / (count_RE * np.maximum(count_RE - 1, 1))
    is_several_RWX = _at_slots(view, count_RE) > 1
    after_RWX = view.load_RW[:, :, None] + _at_slots(view, heavier_RE)
    worse_RWX = np.where(is_several_RWX, view.over(after_RWX) - view.over(view.load_RW)[:, :, None], 0.0)
    lost_RWX = _at_slots(view, _sum_by_expert(view, worse_RWX, num_experts=num_experts)) - worse_RWX
    # No holder that stays may become the most loaded worker.
    is_top_RWX = is_several_RWX & (after_RWX >= view.hot_load_R[:, None, None])
    num_tops_RE = _sum_by_expert(view, is_top_RWX.astype(np.float64), num_experts=num_experts)
    is_spare_RWX: Bools = is_several_RWX & (_at_slots(view, num_tops_RE) - is_top_RWX < 0.5)
    return lost_RWX, is_spare_RWX


def _may_come(view: View, copies: Copies) -> Bools:
    """(R, X, W) whether a worker may take a replica: it has none, nor its domain while others lack one."""
    at = (view.layer_R[:, None], view.hot_expert_RX)
    has_RXW: Bools = copies.by_worker_LEW[at] > 0
    has_RXZ: Bools = copies.by_domain_LEZ[at] > 0
    is_near_RXW: Bools = np.take(has_RXZ, copies.fleet.domain_W, axis=2)
    may_come: Bools = ~has_RXW & (~is_near_RXW | has_RXZ.all(axis=2, keepdims=True))
    return may_come


def _at_slots(view: View, values_RE: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """(R, W, X) the value of the expert in every slot."""
    return values_RE[np.arange(len(values_RE))[:, None, None], view.plan_RWX]


def _sum_by_expert(view: View, values_RWX: Floats, *, num_experts: int) -> Floats:
    """(R, E) sum over the slots of every expert."""
    num_rows = len(values_RWX)
    keys = np.arange(num_rows)[:, None, None] * num_experts + view.plan_RWX
    sums = np.bincount(keys.ravel(), values_RWX.ravel(), minlength=num_rows * num_experts)
    return sums.astype(np.float64, copy=False).reshape(num_rows, num_experts)
