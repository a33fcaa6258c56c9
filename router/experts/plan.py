"""The dispatch plan: which rows go to which expert worker, each token once per worker.

Worked example (also a test): two tokens choose experts [0, 1] and [1, 2]; experts 0 and 1 live on worker 0,
expert 2 on worker 1. Worker 0 gets rows 0 and 1 once each with three assignments (row 0 expert 0, row 0
expert 1, row 1 expert 1); worker 1 gets row 1 with one assignment.

T tokens, D hidden, K top-k, A assignments (token, expert pairs), R rows of one call.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.experts.replicas import WorkerLoads, choose_replicas
from router.experts.table import Bools, Int16, Ints, LayerRoutes, RoutingTable
from wire.errors import StaleTable
from wire.phases import Phase

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

_NUM_BATCH_SIZES = 32
"""Arrays of tokens kept: one for each power of two of tokens."""


class Assignments(NamedTuple):
    """(token, expert) pairs of one layer: three arrays in parallel."""

    token_idx_A: Ints
    """(A,) row of the activations, ascending."""
    expert_idx_A: Int32
    """(A,) logical expert."""
    weight_A: Float32
    """(A,) weight of the expert's output."""


class WorkerCall(NamedTuple):
    """What one expert worker is asked in one dispatch."""

    worker_id: str
    token_idx_R: Ints
    """(R,) rows of the activations that travel, ascending, each once."""
    row_idx_A: Int32
    """(A,) row of each assignment, into `token_idx_R`."""
    expert_idx_A: Int32
    """(A,) logical expert of each assignment."""
    weight_A: Float32
    may_load: bool = False
    """Whether the worker may have to load an expert that is not in its slots."""

    def assignments(self) -> Assignments:
        """The pairs of this call in terms of the whole batch, to plan them again."""
        return Assignments(
            token_idx_A=self.token_idx_R[self.row_idx_A],
            expert_idx_A=self.expert_idx_A,
            weight_A=self.weight_A,
        )


class DispatchPlan(NamedTuple):
    """Every call of one layer's dispatch; combine takes it back."""

    layer_idx: int
    table_version: int
    calls: tuple[WorkerCall, ...]


def assignments_of(ids_TK: Int32, weights_TK: Float32) -> Assignments:
    """The pairs behind a gate's choice, as views of it where it can be; ids of -1 are no choice."""
    token_A = _tokens_of(*ids_TK.shape)
    expert_A, weight_A = ids_TK.reshape(-1), weights_TK.reshape(-1)
    if np.minimum.reduce(expert_A, initial=0) < 0:
        chosen_A = np.flatnonzero(expert_A >= 0)
        token_A, expert_A, weight_A = token_A[chosen_A], expert_A[chosen_A], weight_A[chosen_A]
    return Assignments(token_A, expert_A, weight_A)


def _tokens_of(num_tokens: int, num_choices: int) -> Ints:
    """(T * K,) token of each choice, read-only."""
    return _first_tokens(1 << num_tokens.bit_length(), num_choices)[: num_tokens * num_choices]


@lru_cache(maxsize=_NUM_BATCH_SIZES)
def _first_tokens(num_tokens: int, num_choices: int) -> Ints:
    token_A = np.repeat(np.arange(num_tokens, dtype=np.int64), num_choices)
    token_A.flags.writeable = False
    return token_A


def plan_dispatch(
    assignments: Assignments,
    table: RoutingTable,
    *,
    layer_idx: int,
    loads: WorkerLoads | None,
    phase: Phase | None = None,
) -> DispatchPlan:
    """The calls that compute `assignments`, each token once per destination worker.

    Args:
        assignments: the pairs.
        table: the routing table; its version is copied into the plan.
        layer_idx: MoE layer.
        loads: of the table's workers; None = all are usable and whose turn it is does not matter: each row
            goes to its expert's first copy.
        phase: what the rows are for; their copies are chosen first among those placed for it. None = any.

    Raises:
        StaleTable: the table does not know the layer or an expert.
        ValueError: no worker is usable.
    """
    routes = table.routes(layer_idx, phase)
    may_load_A = None
    if loads is None:
        worker_A = _homes_of(assignments, routes)
    else:
        _check_experts(assignments, routes)
        choice = choose_replicas(routes, assignments.expert_idx_A, assignments.token_idx_A, loads)
        worker_A, may_load_A = choice.worker_A, choice.may_load_A
    calls = _calls_of(assignments, worker_A, may_load_A, worker_ids=table.worker_ids)
    return DispatchPlan(layer_idx=layer_idx, table_version=table.version, calls=calls)


def _homes_of(assignments: Assignments, routes: LayerRoutes) -> Int16:
    """(A,) each expert's first copy; whether all are known is asked only when numpy finds that one is not."""
    try:
        return routes.home_E[assignments.expert_idx_A]
    except IndexError:
        _check_experts(assignments, routes)
        raise


def _check_experts(assignments: Assignments, routes: LayerRoutes) -> None:
    num_experts = len(routes.home_E)
    if (highest := int(assignments.expert_idx_A.max(initial=0))) >= num_experts:
        raise StaleTable(f"expert {highest} is not among {num_experts}")


def _calls_of(
    assignments: Assignments, worker_A: Int16, may_load_A: Bools | None, *, worker_ids: tuple[str, ...]
) -> tuple[WorkerCall, ...]:
    """The calls, in the order of the workers: pieces of one sorted list, for every layer waits for this."""
    order_A = worker_A.argsort(kind="stable")
    token_A = assignments.token_idx_A[order_A]
    expert_A, weight_A = assignments.expert_idx_A[order_A], assignments.weight_A[order_A]
    counts = np.bincount(worker_A).tolist()
    is_first_A = _is_first(token_A, counts)
    row_A = np.add.accumulate(is_first_A.astype(np.int32), dtype=np.int32)
    token_R = token_A[is_first_A]
    calls = []
    begin = begin_row = 0
    for worker_idx, count in enumerate(counts):
        if not count:
            continue
        end = begin + count
        end_row = int(row_A[end - 1])
        call = WorkerCall(
            worker_id=worker_ids[worker_idx],
            token_idx_R=token_R[begin_row:end_row],
            row_idx_A=row_A[begin:end] - (begin_row + 1),
            expert_idx_A=expert_A[begin:end],
            weight_A=weight_A[begin:end],
            may_load=may_load_A is not None and bool(may_load_A[order_A[begin:end]].any()),
        )
        calls.append(call)
        begin, begin_row = end, end_row
    return tuple(calls)


def _is_first(token_A: Ints, counts: Sequence[int]) -> Bools:
    """(A,) where a row begins: tokens ascend within a worker, so where either changes."""
    is_first_A = np.empty(len(token_A), dtype=bool)
    np.not_equal(token_A[1:], token_A[:-1], out=is_first_A[1:])
    begin = 0
    for count in counts:
        is_first_A[begin : begin + 1] = True
        begin += count
    return is_first_A


def add_partial(total_TD: Float64, call: WorkerCall, partial_RD: Float64 | Float32) -> None:
    """Adds one worker's partial sums; FP64, so that the order of the workers changes no bit."""
    if len(partial_RD) == len(total_TD):
        total_TD += partial_RD
    else:
        total_TD[call.token_idx_R] += partial_RD
