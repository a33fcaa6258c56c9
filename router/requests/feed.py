"""The events of all sequences that run on one worker, from the one stream that brings them."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc.aio

from wire.errors import MorayError, WorkerLost, from_rpc
from wire.handshake import Handshake
from wire.proto import attention_pb2

if TYPE_CHECKING:
    from wire.proto.attention_pb2_grpc import AttentionAsyncStub

EventQueue = asyncio.Queue[attention_pb2.SequenceEvent | None]
"""None = look at the call: it has ended, or the feed has."""


class EventFeed:
    """One Follow call; everything on one asyncio loop. A feed that has ended is replaced (links.py)."""

    def __init__(self, stub: "AttentionAsyncStub", handshake: Handshake) -> None:
        """Begins to open the stream."""
        self.stream_id = uuid.uuid4().hex
        self.error: MorayError | None = None
        """Why it has ended."""
        self._queues: dict[int, EventQueue] = {}
        self._numbers = itertools.count()
        self._is_decided = asyncio.Event()
        """It is open, or it has ended."""
        self._task = asyncio.get_running_loop().create_task(self._run(stub, handshake), name="feed")

    @property
    def has_ended(self) -> bool:
        """No event comes any more."""
        return self.error is not None

    @property
    def is_open(self) -> bool:
        """Requests may name it."""
        return self._is_decided.is_set() and self.error is None

    async def wait_open(self) -> None:
        """Returns when the worker has the stream.

        Raises:
            MorayError: why it never will.
        """
        await self._is_decided.wait()
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def attach(self) -> "Iterator[tuple[int, EventQueue]]":
        """A number for a sequence and the queue that its events come in; what comes later is dropped."""
        number, queue = next(self._numbers), EventQueue()
        self._queues[number] = queue
        try:
            yield number, queue
        finally:
            del self._queues[number]

    async def close(self) -> None:
        """Ends the stream."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, stub: "AttentionAsyncStub", handshake: Handshake) -> None:
        error: MorayError = WorkerLost("the worker left the cluster")
        try:
            request = attention_pb2.FollowRequest(stream_id=self.stream_id)
            async for batch in stub.Follow(request, metadata=handshake.to_metadata()):
                self._is_decided.set()
                for numbered in batch.events:
                    if (queue := self._queues.get(numbered.sequence_number)) is not None:
                        queue.put_nowait(numbered.event)
            error = WorkerLost("the worker ended its stream of events")
        except grpc.aio.AioRpcError as broken:
            error = from_rpc(broken)
        finally:
            self.error = error
            self._is_decided.set()
            for queue in self._queues.values():
                queue.put_nowait(None)
