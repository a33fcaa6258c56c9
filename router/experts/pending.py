"""One layer's dispatch in flight: every row is added once, whoever computed it.

A call is an attempt. One that is lost, answered with nonsense or late gets a rescue: its rows are planned
again over the workers that are trusted then, and sent. What is late may still win: whichever is complete
first, the attempt or its rescue, gives the rows, and the other is forgotten.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from router.experts.payload import Sums, encode_rows, forward_tensors, read_partial
from router.experts.plan import Assignments, DispatchPlan, Float32, WorkerCall, add_partial, plan_dispatch
from router.experts.table import RoutingTable
from wire.errors import ExpertNotLoaded, FrameInvalid, MorayError, WorkerLost
from wire.frames import FLAG_LOAD_MISSING, FLAG_PREFILL, Frame, FrameKind

if TYPE_CHECKING:
    from router.experts.dispatcher import ExpertDispatcher

_NEWER_TABLE_S = 0.2
"""First wait for a newer table when no worker of the newest one is trusted; doubles with every attempt."""
_LONGEST_WAIT_S = 2.0
_MOST_NONSENSE = 3
"""Answers that cannot be used before a dispatch fails: then it is the question that is wrong."""

Part = tuple[WorkerCall, Sums]
_Sent = tuple[WorkerCall, Frame, float, "_Arrival", "Future[Frame]"]


@dataclass(eq=False)
class _Arrival:
    """Hears of an answer on the transport's thread and notes when, however much later it is looked at.

    It knows neither its attempt nor the dispatch: in a cycle with the future they would keep the answer, and
    with it the memory of a call, until the next garbage collection.
    """

    changed: threading.Event
    at_s: float | None = None

    def __call__(self, _: "Future[Frame]") -> None:
        """The answer is there."""
        self.at_s = time.monotonic()
        self.changed.set()


@dataclass(eq=False)
class _Attempt:
    call: WorkerCall
    table_version: int
    sent_s: float
    until_s: float
    """When it counts as late."""
    answer: "Future[Frame]"
    arrival: "_Arrival"
    """When its answer came."""
    depth: int
    """How many attempts went before it; each may take twice as long as the one before."""
    is_over: bool = False
    """Whether its own answer was looked at."""
    error: MorayError | None = None
    """Why its rows are sent elsewhere."""
    retry_at_s: float | None = None
    """While nobody is trusted: when everyone is tried."""
    parked_version: int = 0
    """Newest table then."""
    rescue: "list[_Attempt] | None" = None
    parts: list[Part] | None = None
    """Its rows' sums, once they are there."""

    def next_moment_s(self) -> float:
        """When something is to be done about it without an answer."""
        if self.rescue is not None:
            return float("inf")
        if self.error is None:
            return self.until_s
        return float("inf") if self.retry_at_s is None else self.retry_at_s


class PendingDispatch:
    """One layer's dispatch; `result` waits for it. Used by the engine thread."""

    def __init__(
        self, dispatcher: "ExpertDispatcher", *, layer_idx: int, x_TD: Float32, assignments: Assignments
    ) -> None:
        self._dispatcher = dispatcher
        self._metrics = dispatcher.metrics
        self._book = dispatcher.book
        self._layer_idx = layer_idx
        self._phase = dispatcher.phase
        self._flags = dispatcher.forms.flags | (FLAG_PREFILL if self._phase == "prefill" else 0)
        self._x_TD = x_TD
        self._encoded = encode_rows(x_TD, dispatcher.forms.rows)
        self._began_s = time.monotonic()
        self._changed = dispatcher.changed
        self._num_nonsense = 0
        self._last_error: MorayError | None = None
        plan = self._plan(assignments, dispatcher.table_in_force())
        self._attempts = self._send(plan.calls, plan.table_version, depth=0)

    def result(self) -> Float32:
        """(T, D) float32 sum of the chosen experts' weighted outputs, rounded once.

        Raises:
            WorkerLost: the deadline passed before every row was computed.
            MorayError: a worker refused a call for a reason that no other worker mends.
        """
        total_TD = np.zeros(self._x_TD.shape, dtype=np.float64)
        combine_s = 0.0
        waiting = deque(self._attempts)
        while waiting:
            self._changed.clear()
            found = [self._poll(attempt) for attempt in waiting]
            began_s = time.monotonic()
            # In the order of the calls: rounded sums depend on it.
            while waiting and (parts := waiting[0].parts) is not None:
                waiting.popleft()
                for call, sums_RD in parts:
                    add_partial(total_TD, call, sums_RD)
            combine_s += time.monotonic() - began_s
            if None in found:
                self._wait(waiting)
        self._dispatcher.combine_seconds.observe(combine_s)
        self._dispatcher.dispatch_seconds.observe(time.monotonic() - self._began_s)
        return total_TD.astype(np.float32)

    def _wait(self, waiting: Iterable[_Attempt]) -> None:
        """Until something can have changed: an answer, a late attempt, a table for what is parked."""
        open_attempts = [one for attempt in waiting for one in _open_attempts(attempt)]
        if self._left_s() <= 0:
            raise next(
                (one.error for one in open_attempts if one.error is not None), None
            ) or self._no_answer(open_attempts[0].call.worker_id)
        moments_s = [one.next_moment_s() for one in open_attempts]
        self._changed.wait(max(0.0, min(min(moments_s) - time.monotonic(), self._left_s())))

    def _poll(self, attempt: _Attempt) -> list[Part] | None:
        """The parts of an attempt's rows if they are there; starts a rescue where one is due."""
        if attempt.parts is not None:
            return attempt.parts
        if not attempt.is_over and attempt.answer.done():
            attempt.is_over = True
            attempt.parts = self._read(attempt)
        elif not attempt.is_over and attempt.error is None and time.monotonic() >= attempt.until_s:
            attempt.error = self._no_answer(attempt.call.worker_id)
            self._on_failure(attempt.call, reason="late")
        if attempt.parts is None and attempt.error is not None and attempt.rescue is None:
            attempt.rescue = self._resend(attempt, attempt.error)
        if attempt.parts is None and attempt.rescue is not None:
            found = [self._poll(child) for child in attempt.rescue]
            whole = [part for parts in found if parts is not None for part in parts]
            attempt.parts = whole if None not in found else None
        return attempt.parts

    def _read(self, attempt: _Attempt) -> list[Part] | None:
        """An attempt's own answer; None when it is of no use and its rows are sent elsewhere."""
        try:
            reply = attempt.answer.result()
            sums_RD = self._check(reply, attempt)
        except MorayError as error:
            self._on_error(attempt, error)
            attempt.error = self._last_error = error
            return None
        call = attempt.call
        # A waiter can be quicker than the callback that notes the time: then it is now.
        answered_s = time.monotonic() if attempt.arrival.at_s is None else attempt.arrival.at_s
        self._book.on_answer(
            call.worker_id,
            num_rows=call.token_idx_R.size,
            seconds=answered_s - attempt.sent_s,
            queue_rows=reply.queue_rows,
        )
        self._dispatcher.received_bytes.inc(reply.tensors[0].nbytes)
        return [(call, sums_RD)]

    def _on_error(self, attempt: _Attempt, error: MorayError) -> None:
        """Counts an answer that is of no use; raises what no other worker mends."""
        worker_id, reason = attempt.call.worker_id, type(error).__name__
        if isinstance(error, FrameInvalid):
            self._metrics.counter("dispatch_refused_total", reason=error.field).inc()
            self._num_nonsense += 1
            if self._num_nonsense >= _MOST_NONSENSE:
                raise FrameInvalid(f"{worker_id} {error.message}", field=error.field) from None
        elif not error.is_retryable:
            raise error
        if _lacks_expert(attempt, error):
            self._metrics.counter("dispatch_retries_total", reason=reason).inc()
        else:
            self._on_failure(attempt.call, reason=reason)

    def _check(self, reply: Frame, attempt: _Attempt) -> Sums:
        if reply.table_version != attempt.table_version or reply.layer_idx != self._layer_idx:
            raise FrameInvalid(
                f"answered for table {reply.table_version} layer {reply.layer_idx}, "
                f"wanted table {attempt.table_version} layer {self._layer_idx}",
                field="version",
            )
        return read_partial(
            reply,
            num_rows=attempt.call.token_idx_R.size,
            hidden_size=self._x_TD.shape[1],
            form=self._dispatcher.forms.sums,
        )

    def _left_s(self) -> float:
        if self._dispatcher.has_given_up:
            return 0.0
        return max(0.0, self._began_s + self._dispatcher.rules.deadline_s - time.monotonic())

    def _no_answer(self, worker_id: str) -> WorkerLost:
        if self._dispatcher.has_given_up:
            return WorkerLost(f"layer {self._layer_idx}: {worker_id} is not waited for, the caller stops")
        deadline_s = self._dispatcher.rules.deadline_s
        return WorkerLost(
            f"layer {self._layer_idx}: no answer of {worker_id} or another worker in time; "
            f"dispatch.deadline_s={deadline_s:g} s"
        )

    def _on_failure(self, call: WorkerCall, *, reason: str) -> None:
        self._metrics.counter("dispatch_retries_total", reason=reason).inc()
        self._book.on_failure(call.worker_id, now_s=time.monotonic())

    def _resend(self, attempt: _Attempt, error: MorayError) -> list[_Attempt] | None:
        """The attempt's rows, planned on the newest table over the workers that are trusted now.

        None = nobody is trusted: they are parked until a newer table comes, or for a while, and then everyone
        is tried.

        Raises:
            MorayError: the error that made it necessary, when there is no time left.
        """
        if self._left_s() <= 0:
            raise error
        depth = attempt.depth + 1
        if _lacks_expert(attempt, error):
            return self._send([attempt.call._replace(may_load=True)], attempt.table_version, depth=depth)
        table = self._dispatcher.newest_table()
        if not any(self._book.trusted(table.worker_ids)):
            now_s = time.monotonic()
            if attempt.retry_at_s is None:
                wait_s = min(_NEWER_TABLE_S * 2**attempt.depth, _LONGEST_WAIT_S)
                attempt.retry_at_s, attempt.parked_version = now_s + wait_s, table.version
            if now_s < attempt.retry_at_s and table.version == attempt.parked_version:
                return None
        attempt.retry_at_s = None
        plan = self._plan(attempt.call.assignments(), table)
        return self._send(plan.calls, plan.table_version, depth=depth)

    def _plan(self, assignments: Assignments, table: RoutingTable) -> DispatchPlan:
        """Over the workers that are trusted now; over all, if none is."""
        is_trusted_W = self._book.trusted(table.worker_ids)
        loads = None
        if not table.routes(self._layer_idx, self._phase).is_single or not all(is_trusted_W):
            loads = self._dispatcher.loads_of(table)
            if not any(is_trusted_W):
                loads = replace(loads, is_usable_W=[True] * len(is_trusted_W))
        return plan_dispatch(assignments, table, layer_idx=self._layer_idx, loads=loads, phase=self._phase)

    def _send(self, calls: Sequence[WorkerCall], table_version: int, *, depth: int) -> list[_Attempt]:
        """Sends calls one after the other; what is only noted of them waits until the last is out."""
        sent: list[_Sent] = []
        try:
            for call in calls:
                frame = self._frame_of(call, table_version)
                sent_s, arrival = time.monotonic(), _Arrival(self._changed)
                answer = self._dispatcher.transport.send(call.worker_id, frame)
                answer.add_done_callback(arrival)
                sent.append((call, frame, sent_s, arrival, answer))
        finally:
            self._dispatcher.count_sent([frame for _, frame, *_ in sent])
        slack = 2 ** min(depth, 10)
        return [
            _Attempt(
                call=call,
                table_version=table_version,
                sent_s=sent_s,
                until_s=sent_s + slack * self._book.attempt_s(call.worker_id, num_rows=call.token_idx_R.size),
                arrival=arrival,
                depth=depth,
                answer=answer,
            )
            for call, _, sent_s, arrival, answer in sent
        ]

    def _frame_of(self, call: WorkerCall, table_version: int) -> Frame:
        return Frame(
            kind=FrameKind.FORWARD,
            tensors=forward_tensors(self._encoded, call),
            flags=self._flags | (FLAG_LOAD_MISSING if call.may_load else 0),
            table_version=table_version,
            layer_idx=self._layer_idx,
        )


def _lacks_expert(attempt: _Attempt, error: MorayError) -> bool:
    """Whether the worker is sound, but its slots are those of another table: it is asked to load."""
    return isinstance(error, ExpertNotLoaded) and not attempt.call.may_load


def _open_attempts(attempt: _Attempt) -> Iterator[_Attempt]:
    """Those of an attempt and its rescues whose answers may still come, or whose rows are parked."""
    if attempt.parts is not None:
        return
    if not attempt.is_over or attempt.rescue is None:
        yield attempt
    for child in attempt.rescue or ():
        yield from _open_attempts(child)
