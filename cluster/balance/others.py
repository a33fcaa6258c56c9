"""What other holders of an expert gain when it gets a replica more, and lose when it gets one less.

Both are sums of load above the target. A step that adds a replica of one expert and takes one of another
adds them up as if no worker held both, which counts no gain too high: what is above the target is a convex
function of the load.

Letters: E logical experts, W workers, X slots of one worker in one layer, R rows here: layers above their
target.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cluster.balance.types import Bools, Floats, Ints
from cluster.balance.view import View

Number = TypeVar("Number", np.float64, np.int64)


def eased_by_more(view: View, load_RE: Floats, count_RE: Ints) -> Floats:
    """(R, E) load above the target that one more replica of an expert takes off its holders."""
    lighter_RWX = _at_slots(view, load_RE / (count_RE * (count_RE + 1)))
    over_RW1 = view.over(view.load_RW)[:, :, None]
    eased_RWX = over_RW1 - view.over(view.load_RW[:, :, None] - lighter_RWX)
    return _sum_by_expert(view, eased_RWX, num_experts=load_RE.shape[1])


def lost_by_less(view: View, load_RE: Floats, count_RE: Ints) -> tuple[Floats, Bools]:
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


def _at_slots(view: View, values_RE: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """(R, W, X) the value of the expert in every slot."""
    return values_RE[np.arange(len(values_RE))[:, None, None], view.plan_RWX]


def _sum_by_expert(view: View, values_RWX: Floats, *, num_experts: int) -> Floats:
    """(R, E) sum over the slots of every expert."""
    num_rows = len(values_RWX)
    keys = np.arange(num_rows)[:, None, None] * num_experts + view.plan_RWX
    sums = np.bincount(keys.ravel(), values_RWX.ravel(), minlength=num_rows * num_experts)
    return sums.astype(np.float64, copy=False).reshape(num_rows, num_experts)
