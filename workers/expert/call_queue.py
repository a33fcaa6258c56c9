"""Calls that wait for the arithmetic: one thread computes at a time, all calls of a layer together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from wire.frames import Frame
from wire.metrics import Metrics
from workers.expert.types import Reply

AnswerAll = Callable[[Sequence[Frame], Reply], None]


class _Waiting(NamedTuple):
    frame: Frame
    num_rows: int
    reply: Callable[[Frame], None]


class CallQueue:
    """What several attention workers ask of one expert worker.

    Whoever brings a call while nobody computes may compute it itself and answer: a call then wakes no other
    thread. What has gathered meanwhile is computed by a thread of the queue's own, so that nobody who brings
    calls is kept from bringing the next.
    """

    def __init__(
        self,
        answer_all: AnswerAll,
        *,
        start: Callable[[], None],
        metrics: Metrics,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes an empty one.

        Args:
            answer_all: the computation, which one thread at a time calls.
            start: called before the first.
            metrics: shows what waits.
            on_thread: called by the queue's own thread when it begins.
        """
        self._answer_all = answer_all
        self._start = start
        self._metrics = metrics
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._num_rows = 0
        """Of the calls waiting."""
        self._is_computing = False
        """Whether some thread has taken the computation on; only that one runs it. If not, nothing waits."""
        self._is_started = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts", initializer=on_thread)

    def submit(self, frame: Frame, reply: Callable[[Frame], None], *, may_compute: bool) -> None:
        """Puts a call into the queue.

        Args:
            frame: FORWARD.
            reply: gets the answer, on the thread that computed it; must not block or raise.
            may_compute: whether the calling thread may compute it, and those of its layer beside it.
        """
        call = _Waiting(frame, _num_rows(frame), reply)
        with self._lock:
            is_first, self._is_computing = not self._is_computing, True
            if not (is_first and may_compute):
                self._waiting.append(call)
                self._num_rows += call.num_rows
        if not is_first:
            return
        if may_compute:
            self._compute([call])
            with self._lock:
                if not self._waiting:
                    self._is_computing = False
                    return
        self._thread.submit(self._compute_all)

    def close(self) -> None:
        """Ends the queue's thread; no call may come any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compute_all(self) -> None:
        """Computes until nothing waits."""
        while calls := self._take_layer():
            self._compute(calls)

    def _compute(self, calls: Sequence[_Waiting]) -> None:
        if not self._is_started:
            self._start()
            self._is_started = True

        def reply(idx: int, answer: Frame) -> None:
            calls[idx].reply(replace(answer, queue_rows=self._num_rows) if self._num_rows else answer)

        self._answer_all([call.frame for call in calls], reply)

    def _take_layer(self) -> list[_Waiting]:
        """The oldest call and all others of its layer; of an empty queue none, and then nobody computes."""
        with self._lock:
            if not self._waiting:
                self._is_computing = False
                return []
            layer_idx = self._waiting[0].frame.layer_idx
            taken = [call for call in self._waiting if call.frame.layer_idx == layer_idx]
            self._waiting = deque(call for call in self._waiting if call.frame.layer_idx != layer_idx)
            self._num_rows -= sum(call.num_rows for call in taken)
            self._metrics.gauge("queue_rows").set(self._num_rows)
            return taken


def _num_rows(frame: Frame) -> int:
    return len(frame.tensors[0]) if frame.tensors and frame.tensors[0].ndim else 0
