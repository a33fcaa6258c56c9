"""The dispatcher that an attention worker holds: plan, send, wait, combine; sends again what was lost.

An expert call stores nothing, so a lost one is planned again on the newest table and sent to whoever holds
the expert then. Partial sums add up in FP64 and are rounded once, so none of this changes a bit.
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from router.experts.payload import PayloadForms, encode_rows, forward_tensors, read_partial
from router.experts.plan import (
    Assignments,
    DispatchPlan,
    Float32,
    Float64,
    Int32,
    WorkerCall,
    add_partial,
    assignments_of,
    join_assignments,
    plan_dispatch,
)
from router.experts.table import RoutingTable
from router.experts.transport import ExpertTransport
from wire.errors import FrameInvalid, MorayError, NotReady, WorkerLost
from wire.frames import Frame, FrameKind
from wire.metrics import Metrics

_RETRY_S = 0.2
"""Wait for a newer table before a lost call is planned again on the same one."""


@dataclass(frozen=True)
class _Sent:
    call: WorkerCall
    answer: "Future[Frame]"


class ExpertDispatcher:
    """Sends each layer's rows to the expert workers of the routing table in force.

    `set_table` is called by the thread that follows the controller; `adopt_table` and `start` by the engine
    thread, which so never sees the table change within a step.
    """

    def __init__(
        self,
        transport: ExpertTransport,
        *,
        deadline_s: float,
        metrics: Metrics,
        forms: PayloadForms | None = None,
    ) -> None:
        self._transport = transport
        self.forms = forms or PayloadForms()
        self._deadline_s = deadline_s
        self.metrics = metrics
        self._changed = threading.Condition()
        self._newest: RoutingTable | None = None
        self._in_force: RoutingTable | None = None

    def set_table(self, table: RoutingTable) -> None:
        """Offers a newer table; it is in force from the next step or retry on."""
        with self._changed:
            self._newest = table
            self._changed.notify_all()

    def adopt_table(self) -> None:
        """Puts the newest table in force; called between steps. Waits for the very first one.

        Raises:
            NotReady: no table came within the deadline.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None, self._deadline_s)
            self._in_force = self._newest
        if self._in_force is None:
            raise NotReady("no routing table yet: the expert workers are still loading")
        self.metrics.gauge("table_version").set(self._in_force.version)

    def start(self, layer_idx: int, x_TD: Float32, ids_TK: Int32, weights_TK: Float32) -> "PendingDispatch":
        """Starts the routed experts of one layer.

        Args:
            layer_idx: MoE layer.
            x_TD: (T, D) float32 rows.
            ids_TK: (T, K) int32 chosen experts, -1 = none.
            weights_TK: (T, K) float32 weights.
        """
        return PendingDispatch(
            self, layer_idx=layer_idx, x_TD=x_TD, assignments=assignments_of(ids_TK, weights_TK)
        )

    def send_all(self, plan: DispatchPlan, x_TD: Float32) -> list[_Sent]:
        """Sends every call of a plan."""
        sent = []
        encoded = encode_rows(x_TD, self.forms.rows)
        for call in plan.calls:
            frame = Frame(
                kind=FrameKind.FORWARD,
                tensors=forward_tensors(encoded, call),
                flags=self.forms.flags,
                table_version=plan.table_version,
                layer_idx=plan.layer_idx,
            )
            self.metrics.counter("dispatch_rows_total").inc(call.token_idx_R.size)
            num_bytes = sum(tensor.nbytes for tensor in frame.tensors)
            self.metrics.counter("dispatch_bytes_total", direction="sent").inc(num_bytes)
            sent.append(_Sent(call, self._transport.send(call.worker_id, frame)))
        return sent

    def table_in_force(self) -> RoutingTable:
        """The table of this step.

        Raises:
            NotReady: `adopt_table` found none.
        """
        if self._in_force is None:
            raise NotReady("no routing table yet: the expert workers are still loading")
        return self._in_force

    def wait_newer(self, version: int, *, wait_s: float) -> None:
        """Puts a table newer than `version` in force, or the same one again after `wait_s`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._newest is not None and self._newest.version > version, wait_s
            )
        self.adopt_table()

    @property
    def deadline_s(self) -> float:
        """Seconds for one dispatch, retries included."""
        return self._deadline_s


class PendingDispatch:
    """One layer's dispatch in flight; `result` waits for it."""

    def __init__(
        self, dispatcher: ExpertDispatcher, *, layer_idx: int, x_TD: Float32, assignments: Assignments
    ) -> None:
        self._dispatcher = dispatcher
        self._metrics = dispatcher.metrics
        self._layer_idx = layer_idx
        self._x_TD = x_TD
        self._began_s = time.monotonic()
        self._version = 0
        self._sent = self._send(assignments)

    def result(self) -> Float32:
        """(T, D) float32 sum of the chosen experts' weighted outputs, rounded once.

        Raises:
            WorkerLost: the deadline passed before every row was computed.
            MorayError: a worker refused a call for a reason that a retry does not mend.
        """
        total_TD = np.zeros(self._x_TD.shape, dtype=np.float64)
        while self._sent:
            lost = [item.call.assignments() for item in self._sent if not self._collect(item, total_TD)]
            self._sent = []
            if lost:
                wait_s = min(_RETRY_S, self._left_s())
                self._dispatcher.wait_newer(self._version, wait_s=wait_s)
                self._sent = self._send(join_assignments(lost))
        self._metrics.histogram("dispatch_seconds").observe(time.monotonic() - self._began_s)
        return total_TD.astype(np.float32)

    def _send(self, assignments: Assignments) -> list[_Sent]:
        table = self._dispatcher.table_in_force()
        self._version = table.version
        plan = plan_dispatch(assignments, table, layer_idx=self._layer_idx)
        return self._dispatcher.send_all(plan, self._x_TD)

    def _collect(self, item: _Sent, total_TD: Float64) -> bool:
        """Adds one answer; False when the call was lost and must be sent again."""
        try:
            reply = item.answer.result(timeout=self._left_s())
        except TimeoutError:
            raise self._late() from None
        except MorayError as error:
            if not error.is_retryable:
                raise
            self._metrics.counter("dispatch_retries_total", reason=type(error).__name__).inc()
            if self._left_s() <= 0:
                raise
            return False
        try:
            self._check(reply)
            partial_RD = read_partial(
                reply,
                num_rows=item.call.token_idx_R.size,
                hidden_size=self._x_TD.shape[1],
                form=self._dispatcher.forms.sums,
            )
        except FrameInvalid as error:
            self._metrics.counter("dispatch_refused_total", reason=error.field).inc()
            raise FrameInvalid(f"{item.call.worker_id} {error.message}", field=error.field) from None
        self._metrics.counter("dispatch_bytes_total", direction="received").inc(reply.tensors[0].nbytes)
        add_partial(total_TD, item.call, partial_RD)
        return True

    def _check(self, reply: Frame) -> None:
        if reply.table_version != self._version or reply.layer_idx != self._layer_idx:
            raise FrameInvalid(
                f"answered for table {reply.table_version} layer {reply.layer_idx}, "
                f"wanted table {self._version} layer {self._layer_idx}",
                field="version",
            )

    def _left_s(self) -> float:
        return max(0.0, self._began_s + self._dispatcher.deadline_s - time.monotonic())

    def _late(self) -> WorkerLost:
        return WorkerLost(
            f"layer {self._layer_idx}: no answer within dispatch.deadline_s={self._dispatcher.deadline_s:g} s"
        )
