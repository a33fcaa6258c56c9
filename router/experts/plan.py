"""The dispatch plan: which rows go to which expert worker, each token once per worker.

Worked example (also a test): two tokens choose experts [0, 1] and [1, 2]; experts 0 and 1 live on worker 0,
expert 2 on worker 1. Worker 0 gets rows 0 and 1 once each with three assignments (row 0 expert 0, row 0
expert 1, row 1 expert 1); worker 1 gets row 1 with one assignment.

T tokens, D hidden, K top-k, A assignments (token, expert pairs), R rows of one call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.experts.replicas import ReplicaChoice, WorkerLoads, choose_replicas
from router.experts.table import Ints, RoutingTable
from wire.errors import StaleTable
from wire.phases import Phase

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Assignments:
    """(token, expert) pairs of one layer: three arrays in parallel."""

    token_idx_A: Ints
    """(A,) row of the activations, ascending."""
    expert_idx_A: Ints
    """(A,) logical expert."""
    weight_A: Float32
    """(A,) weight of the expert's output."""


@dataclass(frozen=True)
class WorkerCall:
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
            expert_idx_A=self.expert_idx_A.astype(np.int64),
            weight_A=self.weight_A,
        )


@dataclass(frozen=True)
class DispatchPlan:
    """Every call of one layer's dispatch; combine takes it back."""

    layer_idx: int
    table_version: int
    calls: tuple[WorkerCall, ...]


def assignments_of(ids_TK: Int32, weights_TK: Float32) -> Assignments:
    """The pairs behind a gate's choice; ids of -1 are no choice."""
    num_tokens, num_choices = ids_TK.shape
    flat_A = ids_TK.reshape(-1)
    chosen_A = np.flatnonzero(flat_A >= 0)
    token_A = np.repeat(np.arange(num_tokens, dtype=np.int64), num_choices)
    return Assignments(
        token_idx_A=token_A[chosen_A],
        expert_idx_A=flat_A[chosen_A].astype(np.int64),
        weight_A=weights_TK.reshape(-1)[chosen_A],
    )


def plan_dispatch(
    assignments: Assignments,
    table: RoutingTable,
    *,
    layer_idx: int,
    loads: WorkerLoads,
    phase: Phase | None = None,
) -> DispatchPlan:
    """The calls that compute `assignments`, each token once per destination worker.

    Args:
        assignments: the pairs.
        table: the routing table; its version is copied into the plan.
        layer_idx: MoE layer.
        loads: of the table's workers.
        phase: what the rows are for; their copies are chosen first among those placed for it. None = any.

    Raises:
        StaleTable: the table does not know the layer or an expert.
        ValueError: no worker is usable.
    """
    routes = table.routes(layer_idx, phase)
    if assignments.expert_idx_A.size and int(assignments.expert_idx_A.max()) >= table.num_experts:
        raise StaleTable(f"expert {int(assignments.expert_idx_A.max())} is not among {table.num_experts}")
    choice = choose_replicas(routes, assignments.expert_idx_A, assignments.token_idx_A, loads)
    calls = _calls_of(assignments, choice, worker_ids=table.worker_ids)
    return DispatchPlan(layer_idx=layer_idx, table_version=table.version, calls=tuple(calls))


def _calls_of(
    assignments: Assignments, choice: ReplicaChoice, *, worker_ids: tuple[str, ...]
) -> Iterator[WorkerCall]:
    """The calls, in the order of the workers: pieces of one sorted list, for every layer waits for this."""
    order_A = np.argsort(choice.worker_A.astype(np.int16), kind="stable")
    worker_A, token_A = choice.worker_A[order_A], assignments.token_idx_A[order_A]
    expert_A = assignments.expert_idx_A[order_A].astype(np.int32)
    weight_A, may_load_A = assignments.weight_A[order_A], choice.may_load_A[order_A]
    # Tokens ascend within a worker: where either changes, a row begins.
    is_first_A = np.ones(len(order_A), dtype=bool)
    is_first_A[1:] = (token_A[1:] != token_A[:-1]) | (worker_A[1:] != worker_A[:-1])
    row_A = np.cumsum(is_first_A, dtype=np.int32)
    token_R = token_A[is_first_A]
    begin = begin_row = 0
    for worker_idx, count in enumerate(np.bincount(worker_A).tolist()):
        if not count:
            continue
        end = begin + count
        end_row = int(row_A[end - 1])
        yield WorkerCall(
            worker_id=worker_ids[worker_idx],
            token_idx_R=token_R[begin_row:end_row],
            row_idx_A=row_A[begin:end] - np.int32(begin_row + 1),
            expert_idx_A=expert_A[begin:end],
            weight_A=weight_A[begin:end],
            may_load=bool(may_load_A[begin:end].any()),
        )
        begin, begin_row = end, end_row


def add_partial(total_TD: Float64, call: WorkerCall, partial_RD: Float64 | Float32) -> None:
    """Adds one worker's partial sums; FP64, so that the order of the workers changes no bit."""
    if len(partial_RD) == len(total_TD):
        total_TD += partial_RD
    else:
        total_TD[call.token_idx_R] += partial_RD
