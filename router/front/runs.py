"""Requests that have an id of their client's own: they run apart from the stream that started them.

A second stream with the same id and tenant joins the run, from whatever token of each output it wants. A run
whose last stream broke goes on for a while, because gRPC shows a broken connection and a client that gives up
as the same thing; the client that wants its request ended now says so with `Cancel`.
"""

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, Callable

from router.front.admission import Admission
from router.requests.answers import (
    AnswerLogs,
    AnswerShelf,
    KeptAnswer,
    Positions,
    RequestKey,
    advance,
    fingerprint_of,
    first_wanted,
)
from wire.errors import DeadlinePassed, InvalidRequest, MorayError, RequestCancelled
from wire.metrics import Metrics
from wire.proto import inference_pb2

Answering = Callable[
    [inference_pb2.GenerateRequest, float | None], AsyncGenerator[inference_pb2.GenerateResponse, None]
]
"""Makes the answer to a request, one token a message, until the loop time of its deadline."""


class Run:
    """One request that runs, or ran: its task writes, streams read. A kept answer is a run without a task."""

    def __init__(self, key: RequestKey, fingerprint: bytes, *, log: AnswerLogs) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.log = log
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
    """All runs of a router, by tenant and request id; everything on one asyncio loop."""

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
        self._running: dict[RequestKey, Run] = {}

    def __len__(self) -> int:
        """Requests that run now."""
        return len(self._running)

    async def follow(
        self, request: inference_pb2.GenerateRequest, *, end_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The answer to a request from where it wants it on: started here, joined, or off the shelf.

        Args:
            request: has a request id; its numbers of outputs and of positions are checked.
            end_s: loop time at which this stream's deadline passes, or None.

        Raises:
            InvalidRequest: another request has this id, or the answer is shorter than what is wanted.
            MorayError: the request cannot be finished.
        """
        fingerprint = fingerprint_of(request)
        positions = first_wanted(request)
        while True:
            found = self._find(request, fingerprint)
            is_joined, run = found is not None, found or self._start(request, fingerprint, end_s)
            async with contextlib.aclosing(self._read(run, positions)) as messages:
                try:
                    async for message in messages:
                        positions = advance(positions, message)
                        yield message
                    return
                except (DeadlinePassed, RequestCancelled):
                    # Time and patience were those of the stream that started the run; this one may have more.
                    if not is_joined or run.is_cancelled or (end_s is not None and _now_s() >= end_s):
                        raise

    def cancel(self, key: RequestKey) -> bool:
        """Ends a run, all outputs of it, at once; whether there was one."""
        run = self._running.get(key)
        if run is None or run.task is None:
            return False
        run.is_cancelled = True
        run.task.cancel()
        return True

    def _find(self, request: inference_pb2.GenerateRequest, fingerprint: bytes) -> Run | None:
        """The run to join, running or kept."""
        key = _key_of(request)
        kept = self._shelf.find(key, now_s=_now_s())
        run = self._running.get(key) or (Run(key, kept.fingerprint, log=kept.log) if kept else None)
        if run is None:
            return None
        if run.fingerprint != fingerprint:
            raise InvalidRequest(
                f"request_id: wanted an id of its own for every request; {request.request_id!r} belongs to "
                "another request that runs or ended a moment ago; choose another id, or ask for the same",
                field="request_id",
            )
        self._metrics.counter("resumes_total", state="finished" if kept else "running").inc()
        return run

    def _start(self, request: inference_pb2.GenerateRequest, fingerprint: bytes, end_s: float | None) -> Run:
        log = AnswerLogs(request.request_id, num_outputs=max(request.n, 1))
        run = self._running[_key_of(request)] = Run(_key_of(request), fingerprint, log=log)
        run.task = asyncio.get_running_loop().create_task(
            self._carry_out(run, request, end_s), name=f"run-{request.request_id}"
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
        del self._running[run.key]
        if run.farewell is not None:
            run.farewell.cancel()
        error = None if task.cancelled() else task.exception()
        if run.log.is_whole:
            kept = KeptAnswer(fingerprint=run.fingerprint, log=run.log, end_s=_now_s())
            self._shelf.put(run.key, kept, now_s=_now_s())
        else:
            run.error = error or RequestCancelled(
                "the request was cancelled, or its client did not come back in time"
            )
        run.wake()

    async def _read(
        self, run: Run, wanted: Positions
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self._attach(run)
        try:
            positions = wanted
            while True:
                if message := run.log.read(positions):
                    positions = advance(positions, message)
                    yield message
                elif run.log.is_whole:
                    run.log.check_start(wanted)
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


def _key_of(request: inference_pb2.GenerateRequest) -> RequestKey:
    return request.tenant, request.request_id


def _now_s() -> float:
    return asyncio.get_running_loop().time()
