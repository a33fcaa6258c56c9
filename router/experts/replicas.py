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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.experts.table import Bools, Int16, Ints, LayerRoutes

Experts = Ints | npt.NDArray[np.int32]

_ROUNDING = 1e-9
"""Parts of a row that are no row: a sum of FP64 may end that much above a whole number."""


@dataclass(frozen=True, kw_only=True)
class WorkerLoads:
    """What is known of each worker of a table."""

    is_usable_W: Sequence[bool]
    """(W,) whether it may get rows at all."""
    backlog_W: Sequence[float]
    """(W,) rows that wait there, >= 0."""
    row_cost_W: Sequence[float]
    """(W,) what one more row adds, >= 1."""


@dataclass(frozen=True, kw_only=True)
class ReplicaChoice:
    """Where each assignment goes."""

    worker_A: Int16
    """(A,) worker index."""
    may_load_A: Bools
    """(A,) whether its worker does not hold the expert: every copy is out of reach."""


def choose_replicas(
    routes: LayerRoutes, expert_idx_A: Experts, token_idx_A: Ints, loads: WorkerLoads
) -> ReplicaChoice:
    """A worker for every assignment; one that does not hold the expert only where no usable worker does.

    In plain lists: an expert has few copies, and numpy takes longer for each step than the step itself.
    Tokens ascend. The table's shares decide who comes first among copies that have equally much to do.

    Raises:
        ValueError: no worker is usable.
    """
    if not any(loads.is_usable_W):
        raise ValueError("no expert worker is usable")
    order_A = expert_idx_A.argsort(kind="stable")
    counts_E = np.bincount(expert_idx_A).tolist()
    copies_of = _copies_of_chosen(routes, counts_E, token_idx_A[order_A], loads.is_usable_W)
    stand_ins = [expert for expert, copies in copies_of.items() if not copies]
    for expert in stand_ins:
        copies_of[expert] = (_stand_in(expert, loads.is_usable_W),)
    parts_of = _place(copies_of, counts_E, loads)
    workers = [worker_idx for copies in copies_of.values() for worker_idx in copies]
    parts = [part for parts in parts_of.values() for part in parts]
    worker_A = np.empty(len(expert_idx_A), dtype=np.int16)
    worker_A[order_A] = np.repeat(np.array(workers, dtype=np.int16), np.array(parts, dtype=np.int64))
    may_load_A = np.isin(expert_idx_A, stand_ins) if stand_ins else np.zeros(len(expert_idx_A), dtype=bool)
    return ReplicaChoice(worker_A=worker_A, may_load_A=may_load_A)


def _copies_of_chosen(
    routes: LayerRoutes, counts_E: Sequence[int], token_A: Ints, usable: Sequence[bool]
) -> dict[int, Sequence[int]]:
    """The usable workers that hold each chosen expert; `token_A` are its tokens, those of expert 0 first."""
    copies_of: dict[int, Sequence[int]] = {}
    begin = 0
    for expert, count in enumerate(counts_E):
        if not count:
            continue
        copies: Sequence[int] = routes.copies_E[expert]
        if len(copies) > 1 or not usable[copies[0]]:
            copies = _usable_copies(routes, expert, usable, row_idx=int(token_A[begin]) + expert)
        copies_of[expert] = copies
        begin += count
    return copies_of


def _place(
    copies_of: Mapping[int, Sequence[int]], counts_E: Sequence[int], loads: WorkerLoads
) -> dict[int, Sequence[int]]:
    """How many of each expert's rows go to each of its copies."""
    level_W, cost_W = list(loads.backlog_W), loads.row_cost_W
    parts_of: dict[int, Sequence[int]] = {}
    several = []
    for expert, copies in copies_of.items():
        count = counts_E[expert]
        parts_of[expert] = (count,)
        if len(copies) > 1:
            several.append((len(copies), -count, expert, copies))
        else:
            level_W[copies[0]] += count * cost_W[copies[0]]
    for _, count, expert, copies in sorted(several):
        parts = _pour(-count, [level_W[w] for w in copies], [cost_W[w] for w in copies])
        parts_of[expert] = parts
        for worker_idx, part in zip(copies, parts, strict=True):
            level_W[worker_idx] += part * cost_W[worker_idx]
    return parts_of


def _usable_copies(
    routes: LayerRoutes, expert: int, usable: Sequence[bool], *, row_idx: int
) -> Sequence[int]:
    """The workers to choose from for an expert's rows, whose turn it is first."""
    copies = [w for w in routes.copies_of(expert, row_idx=row_idx) if usable[w]]
    if not copies and routes.spare is not None:
        copies = [w for w in routes.spare.copies_of(expert, row_idx=row_idx) if usable[w]]
    return copies


def _stand_in(expert: int, usable: Sequence[bool]) -> int:
    """The usable worker that every dispatcher would choose for an expert without a copy."""
    workers = [worker_idx for worker_idx, is_usable in enumerate(usable) if is_usable]
    return workers[expert % len(workers)]


def _pour(num_rows: int, levels: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Rows for each copy, so that the highest level is as low as can be, within one row.

    Example: 10 rows over the levels 4 and 0, each row costs 1: 3 and 7. One row over equal levels: the first.
    """
    order = sorted(range(len(levels)), key=levels.__getitem__)
    # With the first k copies filled to one height h, sum of (h - level) / cost is the number of rows.
    height, volume, speed = 0.0, float(num_rows), 0.0
    filled: list[int] = []
    for copy in order:
        if filled and levels[copy] > height:
            break
        filled.append(copy)
        volume += levels[copy] / costs[copy]
        speed += 1.0 / costs[copy]
        height = volume / speed
    parts = [0] * len(levels)
    total, given = 0.0, 0
    for copy in filled:
        total += (height - levels[copy]) / costs[copy]
        end = num_rows if copy == filled[-1] else math.ceil(total - _ROUNDING)
        parts[copy], given = end - given, end
    return parts
