"""One call to a decode worker: reads events, tells how it failed, gives back what it booked."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from router.requests.ledger import Ledger
from router.requests.links import WorkerLinks
from router.requests.selection import Route
from wire.errors import ERROR_KEY, DeadlinePassed, MorayError, WorkerLost, from_rpc
from wire.handshake import Handshake
from wire.proto import attention_pb2

_MAX_DEADLINE_MS = (1 << 32) - 1

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

    def __init__(self, call: _Call, on_first_token: Callable[[int], None]) -> None:
        self._call = call
        self._on_first_token = on_first_token
        self._has_tokens = False

    async def read(self) -> attention_pb2.SequenceEvent:
        """The next event.

        Raises:
            AttemptFailed: the call broke, was refused, or ended without an end mark.
        """
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            trailers = error.trailing_metadata() or ()
            is_answer = any(pair[0] == ERROR_KEY for pair in trailers)
            raise AttemptFailed(from_rpc(error), is_answer=is_answer) from error
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            # The call was cancelled and this task was not: its channel was closed under it.
            raise AttemptFailed(WorkerLost("the worker left the cluster"), is_answer=False) from None
        if isinstance(event, attention_pb2.SequenceEvent):
            if event.token_ids and not self._has_tokens:
                self._has_tokens = True
                self._on_first_token(event.num_cached_tokens)
            return event
        raise AttemptFailed(WorkerLost("the worker ended its stream without an end mark"), is_answer=False)


@contextlib.contextmanager
def open_attempt(
    sequence: attention_pb2.SequenceRequest,
    *,
    route: Route,
    terms: CallTerms,
    ledger: Ledger,
    links: WorkerLinks,
) -> Iterator[Attempt]:
    """Starts a call; on leaving, cancels it if it still runs and closes its lease.

    Raises:
        DeadlinePassed: there is no time left to call.
    """
    timeout_s = None if terms.end_s is None else terms.end_s - asyncio.get_running_loop().time()
    if timeout_s is not None and timeout_s <= 0:
        raise DeadlinePassed("the deadline passed before a worker could start")
    if timeout_s is not None:
        sequence.deadline_ms = min(math.ceil(timeout_s * 1000), _MAX_DEADLINE_MS)

    def arrive(num_cached_tokens: int) -> None:
        ledger.end_prefill(lease)
        terms.on_first_token(num_cached_tokens)

    lease = ledger.open(route, prompt_tokens=terms.num_tokens, num_pages=terms.num_pages)
    try:
        call = links.stub(route.decode).Generate(
            sequence, timeout=timeout_s, metadata=terms.handshake.to_metadata()
        )
        try:
            yield Attempt(call, arrive)
        finally:
            call.cancel()
    finally:
        ledger.close(lease)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
