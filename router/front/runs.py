"""Requests that have an id of their client's own: they run apart from the stream that started them.

A second stream with the same id joins the run, from whatever token it wants. A run whose last stream broke
goes on for a while, because gRPC shows a broken connection and a client that gives up as the same thing; the
client that wants its request ended now says so with `Cancel`.
"""

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, Callable

from router.front.admission import Admission
from router.requests.answers import AnswerLog, AnswerShelf, KeptAnswer, fingerprint_of
from wire.errors import DeadlinePassed, InvalidRequest, MorayError, RequestCancelled
from wire.metrics import Metrics
from wire.proto import inference_pb2

Answering = Callable[
    [inference_pb2.GenerateRequest, float | None], AsyncGenerator[inference_pb2.GenerateResponse, None]
]
"""Makes the answer to a request, one token a message, until the loop time of its deadline."""


class Run:
    """One request that runs, or ran: its task writes, streams read. A kept answer is a run without a task."""

    def __init__(self, request_id: str, fingerprint: bytes, *, log: AnswerLog | None = None) -> None:
        self.request_id = request_id
        self.fingerprint = fingerprint
        self.log = log or AnswerLog(request_id)
        self.num_readers = 0
        self.error: BaseException | None = None
        """Why it ended, where its answer is not whole."""
        self.is_cancelled = False
        """Its client said so."""
        self.task: asyncio.Task[None] | None = None
        self.farewell: asyncio.TimerHandle | None = None
        """Ends the run unless a stream comes back in time."""
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """There is something new to read."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Returns at the next `wake`."""
        await self._changed.wait()


class SharedRuns:
    """All runs of a router, by request id; everything on one asyncio loop."""

    def __init__(
        self,
        answering: Answering,
        *,
        admission: Admission,
        shelf: AnswerShelf,
        grace_s: float,
        metrics: Metrics,
    ) -> None:
        self._answering = answering
        self._admission = admission
        self._shelf = shelf
        self._grace_s = grace_s
        self._metrics = metrics
        self._running: dict[str, Run] = {}

    def __len__(self) -> int:
        """Requests that run now."""
        return len(self._running)

    async def follow(
        self, request: inference_pb2.GenerateRequest, *, end_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The answer to a request from its `resume_from` on: started here, joined, or off the shelf.

        Args:
            request: has a request id.
            end_s: loop time at which this stream's deadline passes, or None.

        Raises:
            InvalidRequest: another request has this id, or the answer is shorter than `resume_from`.
            MorayError: the request cannot be finished.
        """
        fingerprint = fingerprint_of(request)
        next_idx = request.resume_from
        while True:
            found = self._find(request, fingerprint)
            is_joined, run = found is not None, found or self._start(request, fingerprint, end_s)
            async with contextlib.aclosing(self._read(run, next_idx)) as messages:
                try:
                    async for message in messages:
                        next_idx = message.first_idx + len(message.token_ids)
                        yield message
                    return
                except (DeadlinePassed, RequestCancelled):
                    # Time and patience were those of the stream that started the run; this one may have more.
                    if not is_joined or run.is_cancelled or (end_s is not None and _now_s() >= end_s):
                        raise

    def cancel(self, request_id: str) -> bool:
        """Ends a run at once; whether there was one."""
        run = self._running.get(request_id)
        if run is None or run.task is None:
            return False
        run.is_cancelled = True
        run.task.cancel()
        return True

    def _find(self, request: inference_pb2.GenerateRequest, fingerprint: bytes) -> Run | None:
        """The run to join, running or kept."""
        request_id = request.request_id
        kept = self._shelf.find(request_id, now_s=_now_s())
        run = self._running.get(request_id) or (
            Run(request_id, kept.fingerprint, log=kept.log) if kept else None
        )
        if run is None:
            return None
        if run.fingerprint != fingerprint:
            raise InvalidRequest(
                f"request_id: wanted an id of its own for every request; {request_id!r} belongs to another "
                "request that runs or ended a moment ago; choose another id, or ask for exactly the same",
                field="request_id",
            )
        self._metrics.counter("resumes_total", state="finished" if kept else "running").inc()
        return run

    def _start(self, request: inference_pb2.GenerateRequest, fingerprint: bytes, end_s: float | None) -> Run:
        run = Run(request.request_id, fingerprint)
        self._running[run.request_id] = run
        run.task = asyncio.get_running_loop().create_task(
            self._carry_out(run, request, end_s), name=f"run-{run.request_id}"
        )
        run.task.add_done_callback(lambda task: self._end(run, task))
        return run

    async def _carry_out(self, run: Run, request: inference_pb2.GenerateRequest, end_s: float | None) -> None:
        with self._admission.enter():
            async with contextlib.aclosing(self._answering(request, end_s)) as messages:
                async for message in messages:
                    run.log.add(message)
                    run.wake()

    def _end(self, run: Run, task: asyncio.Task[None]) -> None:
        """The task is done, however; even if it was cancelled before its first step."""
        del self._running[run.request_id]
        if run.farewell is not None:
            run.farewell.cancel()
        error = None if task.cancelled() else task.exception()
        if run.log.is_whole:
            kept = KeptAnswer(fingerprint=run.fingerprint, log=run.log, end_s=_now_s())
            self._shelf.put(run.request_id, kept, now_s=_now_s())
        else:
            run.error = error or RequestCancelled(
                "the request was cancelled, or its client did not come back in time"
            )
        run.wake()

    async def _read(self, run: Run, token_idx: int) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self._attach(run)
        try:
            first_idx = token_idx
            while True:
                if found := run.log.read(token_idx):
                    message, token_idx = found
                    yield message
                elif run.log.is_whole:
                    run.log.check_start(first_idx)
                    return
                elif run.error is not None:
                    raise copy.copy(run.error) if isinstance(run.error, MorayError) else run.error
                else:
                    await run.wait()
        finally:
            self._detach(run)

    def _attach(self, run: Run) -> None:
        run.num_readers += 1
        if run.farewell is not None:
            run.farewell.cancel()
            run.farewell = None

    def _detach(self, run: Run) -> None:
        run.num_readers -= 1
        if run.num_readers == 0 and run.task is not None and not run.task.done():
            run.farewell = asyncio.get_running_loop().call_later(self._grace_s, run.task.cancel)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
