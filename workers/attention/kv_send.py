"""The prefill worker's side of a hand-over: rows go out layer by layer while later layers are computed.

The engine's thread only copies the rows out of its cache; frames are made and sent on the event loop. A
receiver that reads nothing for the lease is cut off, so that its pages and the frames that wait are freed.
"""

import asyncio
from dataclasses import dataclass, field

from wire.errors import FrameInvalid, WorkerLost
from wire.metrics import Metrics
from wire.rpc import Context
from workers.attention.drain import Door
from workers.attention.engine import Engine
from workers.attention.kv_transfer import Alive, Fence, encode_transfer
from workers.attention.relay import EventRelay
from workers.attention.types import CacheRows, Event, Failed, Key, NewToken, SequenceSpec

_SIGNS_PER_LEASE = 4


@dataclass(frozen=True)
class _Open:
    """A pull that is being answered."""

    spec: SequenceSpec
    transfer: int
    events: "asyncio.Queue[Event]"


@dataclass(frozen=True, kw_only=True)
class KvSender:
    """Answers pulls; lives on the event loop."""

    engine: Engine
    relay: EventRelay
    door: Door
    lease_s: float
    metrics: Metrics
    _open: dict[Key, _Open] = field(default_factory=dict)

    async def send(self, spec: SequenceSpec, transfer: int, context: Context) -> None:
        """Prefills a sequence and writes its frames, the first token last.

        Raises:
            FrameInvalid: a newer pull of the same attempt took over.
            WorkerLost: the receiver did not read for the lease.
            MorayError: the prefill failed.
        """
        pull = self._begin(spec, transfer)
        result = "failed"
        try:
            with self.door.enter(spec.source, lambda error: pull.events.put_nowait(Failed(error))):
                self.engine.submit(spec, self.relay.sink(pull.events))
                await self._send_events(pull, context)
            result = "sent"
        except TimeoutError:
            result = "cut_off"
            raise WorkerLost(f"{spec.key}: its receiver read nothing for {self.lease_s:g} s") from None
        except FrameInvalid as error:
            result = "superseded" if error.field == "fence" else result
            raise
        finally:
            self.engine.cancel(spec)
            if self._open.get(spec.key) is pull:
                del self._open[spec.key]
            self.metrics.counter("kv_transfers_total", result=result).inc()

    def _begin(self, spec: SequenceSpec, transfer: int) -> _Open:
        """Ends an older pull of the same attempt."""
        pull = _Open(spec, transfer, asyncio.Queue())
        older = self._open.get(spec.key)
        if older is None or older.transfer < transfer:
            self._open[spec.key] = pull
            if older is not None:
                self.engine.cancel(older.spec)
                older.events.put_nowait(Failed(FrameInvalid(f"pull {transfer} took over", field="fence")))
        return pull

    async def _send_events(self, pull: _Open, context: Context) -> None:
        spec = pull.spec
        fence = Fence(request_id=spec.request_id, attempt=spec.attempt, transfer=pull.transfer)
        while True:
            event = await self._next(pull.events)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, CacheRows | NewToken | Alive):
                data = encode_transfer(fence, event)
                async with asyncio.timeout(self.lease_s):
                    await context.write(data)
                self.metrics.counter("kv_bytes_total", direction="sent").inc(len(data))
            if isinstance(event, NewToken):
                return

    async def _next(self, events: "asyncio.Queue[Event]") -> Event | Alive:
        """The next event; a sign of life where there is none for a while."""
        try:
            async with asyncio.timeout(self.lease_s / _SIGNS_PER_LEASE):
                return await events.get()
        except TimeoutError:
            return Alive()
