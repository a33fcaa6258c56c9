"""Streams that carry the events of many sequences to one router: of one step, one message.

A message of its own for every token costs the worker, the network and the router more than the token: at 32
sequences, several milliseconds of a processor a step.
"""

import asyncio
from collections.abc import AsyncGenerator

from wire.errors import InvalidRequest, NotReady
from wire.proto import attention_pb2
from workers.attention.relay import Taker
from workers.attention.requests import write_event
from workers.attention.types import Event, NewToken, PromptLogprobs


class EventStreams:
    """All open streams of a worker, by the id that their router chose; everything on one asyncio loop."""

    def __init__(self) -> None:
        self._streams: dict[str, EventStream] = {}

    async def follow(self, stream_id: str) -> AsyncGenerator[attention_pb2.EventBatch, None]:
        """Opens a stream and gives its messages, until `close`.

        Raises:
            InvalidRequest: there is such a stream already, or the id is empty.
        """
        if not stream_id or stream_id in self._streams:
            raise InvalidRequest(f"stream_id: wanted a new one, got {stream_id!r}", field="stream_id")
        stream = self._streams[stream_id] = EventStream()
        try:
            yield attention_pb2.EventBatch()
            while (batch := await stream.take()).events:
                yield batch
        finally:
            del self._streams[stream_id]

    def find(self, stream_id: str) -> "EventStream | None":
        """The stream of a request; None = it names none.

        Raises:
            NotReady: the stream has ended; its router opens another one and asks again.
        """
        if not stream_id:
            return None
        stream = self._streams.get(stream_id)
        if stream is None:
            raise NotReady(f"the stream {stream_id} has ended")
        return stream

    def close(self) -> None:
        """Ends every stream behind what it holds."""
        for stream in self._streams.values():
            stream.close()


class EventStream:
    """Events on their way to one router."""

    def __init__(self) -> None:
        self._batch = attention_pb2.EventBatch()
        self._is_closed = False
        self._changed = asyncio.Event()

    def put(self, sequence_number: int, event: NewToken | PromptLogprobs) -> None:
        """Behind all others; goes out with the next message."""
        self._batch.events.add(sequence_number=sequence_number, event=write_event(event))
        self._changed.set()

    async def take(self) -> attention_pb2.EventBatch:
        """Waits for events; all that have gathered, none = the stream is closed."""
        while not self._batch.events and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        batch, self._batch = self._batch, attention_pb2.EventBatch()
        return batch

    def close(self) -> None:
        """No event comes any more."""
        self._is_closed = True
        self._changed.set()


class StreamTaker:
    """What a sequence tells: tokens to its stream, and the rest, its last token too, to who waits for it."""

    def __init__(self, stream: EventStream, sequence_number: int, rest: Taker) -> None:
        self._stream = stream
        self._sequence_number = sequence_number
        self._rest = rest

    def put_nowait(self, event: Event) -> None:
        """See Taker."""
        if isinstance(event, NewToken | PromptLogprobs):
            self._stream.put(self._sequence_number, event)
            if not isinstance(event, NewToken) or not event.finish:
                return
        self._rest.put_nowait(event)
