"""The prefill worker's side of a hand-over: rows go out layer by layer while later layers are computed.

The engine's thread only copies the rows out of its cache; frames are made and sent on the event loop. A
receiver that reads nothing for the lease is cut off, so that its pages and the frames that wait are freed.
Where both sides speak NIXL, rows are left in the stage, and a frame says where.
"""

import asyncio
from dataclasses import dataclass, field

from wire.errors import FrameInvalid, WorkerLost
from wire.metrics import Metrics
from wire.rpc import Context
from workers.attention.drain import Door
from workers.attention.engine import Engine
from workers.attention.kv_stage import KvStage, Pieces
from workers.attention.kv_transfer import Alive, Fence, PlacedRows, encode_transfer
from workers.attention.relay import EventRelay
from workers.attention.types import CacheRows, Event, Failed, Key, NewToken, SequenceSpec

_SIGNS_PER_LEASE = 4


@dataclass(frozen=True)
class _Open:
    """A pull that is being answered."""

    spec: SequenceSpec
    transfer: int
    events: "asyncio.Queue[Event]"
    pieces: Pieces
    """What of it lies in the stage."""

    @property
    def fence(self) -> Fence:
        """Rides on its frames."""
        spec = self.spec
        return Fence(request_id=spec.request_id, attempt=spec.attempt, transfer=self.transfer)


@dataclass(frozen=True, kw_only=True)
class KvSender:
    """Answers pulls; lives on the event loop."""

    engine: Engine
    relay: EventRelay
    door: Door
    lease_s: float
    metrics: Metrics
    stage: KvStage | None = None
    """None = rows travel in frames."""
    _open: dict[Key, _Open] = field(default_factory=dict)

    async def send(self, spec: SequenceSpec, transfer: int, context: Context, *, nixl_bytes: int = 0) -> None:
        """Prefills a sequence and writes its frames, the first token last.

        Args:
            spec: the sequence.
            transfer: which pull of its attempt.
            context: of the call.
            nixl_bytes: what the receiver reads over NIXL at once; 0 = nothing.

        Raises:
            FrameInvalid: a newer pull of the same attempt took over.
            WorkerLost: the receiver did not read for the lease.
            MorayError: the prefill failed.
        """
        pull = self._begin(spec, transfer, nixl_bytes)
        result = "failed"
        try:
            with self.door.enter(spec.source, lambda error: pull.events.put_nowait(Failed(error))):
                self.engine.submit(spec, self.relay.sink(pull.events))
                await self._send_events(pull, context)
                result = "sent"
                await pull.pieces.wait_read(self.lease_s)
        except TimeoutError:
            result = "cut_off"
            raise WorkerLost(f"{spec.key}: its receiver read nothing for {self.lease_s:g} s") from None
        except FrameInvalid as error:
            result = "superseded" if error.field == "fence" else result
            raise
        finally:
            pull.pieces.give_up()
            self.engine.cancel(spec)
            if self._open.get(spec.key) is pull:
                del self._open[spec.key]
            self.metrics.counter("kv_transfers_total", result=result).inc()

    def _begin(self, spec: SequenceSpec, transfer: int, nixl_bytes: int) -> _Open:
        """Ends an older pull of the same attempt."""
        pieces = self.stage.open(nixl_bytes) if self.stage else Pieces(0)
        pull = _Open(spec, transfer, asyncio.Queue(), pieces)
        older = self._open.get(spec.key)
        if older is None or older.transfer < transfer:
            self._open[spec.key] = pull
            if older is not None:
                self.engine.cancel(older.spec)
                older.events.put_nowait(Failed(FrameInvalid(f"pull {transfer} took over", field="fence")))
        return pull

    async def _send_events(self, pull: _Open, context: Context) -> None:
        while True:
            event = await self._next(pull.events)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, CacheRows | NewToken | Alive):
                placed = await self._place(pull, event) if isinstance(event, CacheRows) else None
                data = encode_transfer(pull.fence, placed or event)
                async with asyncio.timeout(self.lease_s):
                    await context.write(data)
                num_bytes = len(data) + (placed.num_bytes if placed else 0)
                self.metrics.counter("kv_bytes_total", direction="sent").inc(num_bytes)
            if isinstance(event, NewToken):
                return

    async def _place(self, pull: _Open, rows: CacheRows) -> PlacedRows | None:
        """Leaves rows in the stage; None = they go in a frame, because nothing else is wanted or has room."""
        placed = None
        if self.stage is not None and pull.pieces.max_bytes:
            placed = await self.stage.place(pull.pieces, rows)
            form = "no_room" if placed is None else "nixl"
        else:
            form = "plain"
        self.metrics.counter("kv_frames_total", form=form).inc()
        return placed

    async def _next(self, events: "asyncio.Queue[Event]") -> Event | Alive:
        """The next event; a sign of life where there is none for a while."""
        try:
            async with asyncio.timeout(self.lease_s / _SIGNS_PER_LEASE):
                return await events.get()
        except TimeoutError:
            return Alive()
