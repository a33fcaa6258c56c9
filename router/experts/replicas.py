"""The replica bias: which copy of a chosen expert gets a row. A pure decision that changes no output.

Water-filling: rows whose expert has one copy are placed first; then, expert by expert, the fewest copies
first and among equals the most rows, rows go to the copies that have least to do until those are as full as
the next. What a copy has to do is what waits at its worker plus what this dispatch sends there; a straggler's
rows count more than one. A benchmark compares it with shares alone and with the better of two random copies
(benchmarks/replica_bias.py).

Worked example (also a test): expert 0 has copies on workers 0 and 1, 10 rows choose it, and 4 rows wait at
worker 0: worker 0 gets 3 rows and worker 1 gets 7, so that each has 7 before it.

A assignments (token, expert pairs), E experts, M most copies of an expert, W workers.
"""

from dataclasses import dataclass

import numpy as np

from router.experts.peers import Bools, Floats
from router.experts.table import Ints, LayerRoutes

_ROUNDING = 1e-9
"""Parts of a row that are no row: a sum of FP64 may end that much above a whole number."""


@dataclass(frozen=True, kw_only=True)
class WorkerLoads:
    """What is known of each worker of a table."""

    is_usable_W: Bools
    """(W,) whether it may get rows at all."""
    backlog_W: Floats
    """(W,) rows that wait there, >= 0."""
    row_cost_W: Floats
    """(W,) what one more row adds, >= 1."""


@dataclass(frozen=True, kw_only=True)
class ReplicaChoice:
    """Where each assignment goes."""

    worker_A: Ints
    """(A,) worker index."""
    may_load_A: Bools
    """(A,) whether its worker does not hold the expert: every copy is out of reach."""


def choose_replicas(
    routes: LayerRoutes, expert_idx_A: Ints, token_idx_A: Ints, loads: WorkerLoads
) -> ReplicaChoice:
    """A worker for every assignment; one that does not hold the expert only where no usable worker does.

    The table's shares decide who comes first among copies that have equally much to do.

    Raises:
        ValueError: no worker is usable.
    """
    if not loads.is_usable_W.any():
        raise ValueError("no expert worker is usable")
    if loads.is_usable_W.all() and routes.num_copies_E[expert_idx_A].max(initial=1) == 1:
        return ReplicaChoice(
            worker_A=routes.worker_EM[expert_idx_A, 0], may_load_A=np.zeros(len(expert_idx_A), dtype=bool)
        )
    return _fill(routes, expert_idx_A, token_idx_A, loads)


def _fill(routes: LayerRoutes, expert_idx_A: Ints, token_idx_A: Ints, loads: WorkerLoads) -> ReplicaChoice:
    level_W = loads.backlog_W.astype(np.float64)
    worker_A = np.empty(len(expert_idx_A), dtype=np.int64)
    may_load_A = np.zeros(len(expert_idx_A), dtype=bool)
    order_A = np.lexsort((token_idx_A, expert_idx_A))
    experts, begins, counts = np.unique(expert_idx_A[order_A], return_index=True, return_counts=True)
    several = []
    for expert, begin, count in zip(experts.tolist(), begins.tolist(), counts.tolist(), strict=True):
        rows = order_A[begin : begin + count]
        copies = routes.copies_of(expert, row_idx=int(token_idx_A[rows[0]]))
        copies = copies[loads.is_usable_W[copies]]
        if len(copies) > 1:
            several.append((len(copies), -count, expert, rows, copies))
            continue
        if len(copies) == 0:
            copies = _stand_in(expert, loads.is_usable_W)
            may_load_A[rows] = True
        worker_A[rows] = copies[0]
        level_W[copies[0]] += count * loads.row_cost_W[copies[0]]
    for _, _, _, rows, copies in sorted(several, key=lambda item: item[:3]):
        parts = _pour(len(rows), level_W[copies], loads.row_cost_W[copies])
        worker_A[rows] = np.repeat(copies, parts)
        level_W[copies] += parts * loads.row_cost_W[copies]
    return ReplicaChoice(worker_A=worker_A, may_load_A=may_load_A)


def _stand_in(expert: int, is_usable_W: Bools) -> Ints:
    """The usable worker that every dispatcher would choose for an expert without a copy."""
    usable: Ints = np.flatnonzero(is_usable_W)
    return usable[[expert % len(usable)]]


def _pour(num_rows: int, level_M: Floats, cost_M: Floats) -> Ints:
    """(M,) rows for each copy, so that the highest level is as low as can be, within one row.

    Example: 10 rows over the levels 4 and 0, each row costs 1: 3 and 7. One row over equal levels: the first.
    """
    order = np.argsort(level_M, kind="stable")
    level, speed = level_M[order], 1.0 / cost_M[order]
    # With the first k copies filled to one height h, sum of (h - level) * speed is the number of rows.
    height = (num_rows + np.cumsum(level * speed)) / np.cumsum(speed)
    num_filled = int(np.flatnonzero(height >= level)[-1]) + 1
    given = np.maximum(height[num_filled - 1] - level[:num_filled], 0.0) * speed[:num_filled]
    ends = np.ceil(np.cumsum(given) - _ROUNDING).astype(np.int64)
    ends[-1] = num_rows
    parts = np.zeros(len(level_M), dtype=np.int64)
    parts[order[:num_filled]] = np.diff(ends, prepend=0)
    return parts
