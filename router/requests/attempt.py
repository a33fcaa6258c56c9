"""One call to a decode worker: reads events, tells how it failed, gives back what it booked."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from router.requests.feed import EventFeed, EventQueue
from router.requests.ledger import Ledger
from router.requests.links import WorkerLinks
from router.requests.selection import Route
from wire.errors import ERROR_KEY, DeadlinePassed, MorayError, WorkerLost, from_rpc
from wire.handshake import Handshake
from wire.proto import attention_pb2

_MAX_DEADLINE_MS = (1 << 32) - 1
_LAST_EVENTS_S = 5.0
"""The worker has sent the last events when it ends the call: how long they may still be on their way."""

_Call = grpc.aio.UnaryStreamCall[attention_pb2.SequenceRequest, attention_pb2.SequenceEvent]


@dataclass(frozen=True, kw_only=True)
class CallTerms:
    """What a call to a worker takes along, besides the sequence."""

    handshake: Handshake
    num_tokens: int
    """To compute before the first new token."""
    num_pages: int
    """KV pages that the request may add to those of its decode worker."""
    on_first_token: Callable[[int], None]
    """Gets the number of tokens that the decode worker took from its cache."""
    end_s: float | None
    """Loop time at which the client's deadline passes; None = it has none."""


class AttemptFailed(Exception):
    """Internal to the session: an attempt's error, and whether the worker itself answered it."""

    def __init__(self, error: MorayError, is_answer: bool) -> None:
        super().__init__(error, is_answer)
        self.error = error
        self.is_answer = is_answer


class Attempt:
    """An open call; made by `open_attempt`, which also ends it."""

    def __init__(
        self, call: _Call, *, feed: EventFeed, events: EventQueue, on_first_token: Callable[[int], None]
    ) -> None:
        self._call = call
        self._feed = feed
        self._events = events
        self._on_first_token = on_first_token
        self._has_tokens = False
        call.add_done_callback(lambda _: events.put_nowait(None))

    async def read(self) -> attention_pb2.SequenceEvent:
        """The next event.

        Raises:
            AttemptFailed: the call broke, was refused, or ended without an end mark.
        """
        event = await self._events.get()
        if event is None:
            await self._check_call()
            event = await self._read_rest()
        if event.token_ids and not self._has_tokens:
            self._has_tokens = True
            self._on_first_token(event.num_cached_tokens)
        return event

    async def _check_call(self) -> None:
        """Returns if it has ended well; its last events may then still be on their way."""
        if self._feed.error is not None and not self._call.done():
            raise AttemptFailed(self._feed.error, is_answer=False)
        try:
            await self._call.read()
        except grpc.aio.AioRpcError as error:
            trailers = error.trailing_metadata() or ()
            is_answer = any(pair[0] == ERROR_KEY for pair in trailers)
            raise AttemptFailed(from_rpc(error), is_answer=is_answer) from error
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            # The call was cancelled and this task was not: its channel was closed under it.
            raise AttemptFailed(WorkerLost("the worker left the cluster"), is_answer=False) from None

    async def _read_rest(self) -> attention_pb2.SequenceEvent:
        """An event of a call that has ended well; of a feed that has ended, too, none is on its way."""
        event = None
        if not self._feed.has_ended:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self._events.get(), _LAST_EVENTS_S)
        elif not self._events.empty():
            event = self._events.get_nowait()
        if event is None:
            error = self._feed.error or WorkerLost("the worker ended its stream without an end mark")
            raise AttemptFailed(error, is_answer=False)
        self._events.put_nowait(None)
        return event


@contextlib.asynccontextmanager
async def open_attempt(
    sequence: attention_pb2.SequenceRequest,
    *,
    route: Route,
    terms: CallTerms,
    ledger: Ledger,
    links: WorkerLinks,
) -> AsyncIterator[Attempt]:
    """Starts a call; on leaving, cancels it if it still runs and closes its lease.

    Raises:
        DeadlinePassed: there is no time left to call.
        AttemptFailed: the worker cannot be reached, or refuses this router.
    """

    def arrive(num_cached_tokens: int) -> None:
        ledger.end_prefill(lease)
        terms.on_first_token(num_cached_tokens)

    lease = ledger.open(route, prompt_tokens=terms.num_tokens, num_pages=terms.num_pages)
    try:
        link = links.find(route.decode)
        feed = link.feed(terms.handshake)
        await _wait_open(feed, _left_s(terms))
        timeout_s = _left_s(terms)
        if timeout_s is not None:
            sequence.deadline_ms = min(math.ceil(timeout_s * 1000), _MAX_DEADLINE_MS)
        with feed.attach() as (sequence.sequence_number, events):
            sequence.stream_id = feed.stream_id
            call = link.stub.Generate(sequence, timeout=timeout_s, metadata=terms.handshake.to_metadata())
            try:
                yield Attempt(call, feed=feed, events=events, on_first_token=arrive)
            finally:
                call.cancel()
    finally:
        ledger.close(lease)


def _left_s(terms: CallTerms) -> float | None:
    """Seconds up to the deadline; None = there is none."""
    left_s = None if terms.end_s is None else terms.end_s - asyncio.get_running_loop().time()
    if left_s is not None and left_s <= 0:
        raise DeadlinePassed("the deadline passed before a worker could start")
    return left_s


async def _wait_open(feed: EventFeed, timeout_s: float | None) -> None:
    if feed.is_open:
        return
    try:
        await asyncio.wait_for(feed.wait_open(), timeout_s)
    except TimeoutError:
        raise DeadlinePassed("the deadline passed before a worker could start") from None
    except MorayError as error:
        raise AttemptFailed(error, is_answer=False) from error


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
