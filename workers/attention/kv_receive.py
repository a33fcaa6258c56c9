"""The decode worker's side of a hand-over: it pulls rows from a prefill worker into the engine.

What is not exactly the next piece is refused, and the pull is given up and asked for once more under the next
fence; when that fails too, the prompt is computed here. A prefill worker that gives no sign for the lease is
lost: the router must choose another one. What is asked for again comes in plain frames, also where both sides
speak NIXL.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from wire.errors import PREFILL_FIELD, FrameInvalid, MorayError, Overloaded, WorkerLost, from_rpc
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import attention_pb2
from wire.rpc import CHANNEL_OPTIONS, PREFILL_METHOD
from workers.attention.engine import Engine
from workers.attention.kv_receipt import Receipt, Wanted
from workers.attention.kv_transfer import Fence, PlacedRows, decode_transfer
from workers.attention.nixl_link import NixlLink
from workers.attention.requests import ask_prefill
from workers.attention.types import CacheRows, NewToken, SequenceSpec

_log = logging.getLogger(__name__)

_MAX_PULLS = 2
_READS_PER_LEASE = 4
"""A read over NIXL may take this part of the lease: there is still time for plain frames."""


@dataclass(frozen=True, kw_only=True)
class KvReceiver:
    """Pulls hand-overs; owns the channels to prefill workers. Lives on the event loop."""

    engine: Engine
    handshake: Handshake
    lease_s: float
    metrics: Metrics
    link: NixlLink | None = None
    """None = rows come in frames."""
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    async def close(self) -> None:
        """Closes every channel."""
        for channel in self._channels.values():
            await channel.close()

    async def receive(
        self,
        spec: SequenceSpec,
        request: attention_pb2.SequenceRequest,
        *,
        first_row: int,
        came_s: float,
        on_error: Callable[[MorayError], None],
    ) -> None:
        """Fills the pages of an admitted sequence, or has it computed here; tells what it cannot mend.

        Args:
            spec: the sequence.
            request: what asked for it.
            first_row: the rows before are cached here.
            came_s: loop time at which it came.
            on_error: told why neither can be done.
        """
        result = "received"
        try:
            if not await self._pull_again(spec, request, first_row=first_row, came_s=came_s):
                result = "local"
                self.engine.compute_here(spec.key)
        except grpc.aio.AioRpcError as error:
            result = "failed"
            on_error(_said_by_prefill(from_rpc(error)))
        except TimeoutError:
            result = "lost"
            what = f"prefill worker {request.prefill_address} gave no sign for {self.lease_s:g} s"
            on_error(WorkerLost(what))
        self.metrics.counter("kv_transfers_total", result=result).inc()

    async def _pull_again(
        self, spec: SequenceSpec, request: attention_pb2.SequenceRequest, *, first_row: int, came_s: float
    ) -> bool:
        """Whether one of the pulls brought everything."""
        for transfer in range(_MAX_PULLS):
            waited_s = asyncio.get_running_loop().time() - came_s
            asked = ask_prefill(request, first_row=first_row, transfer=transfer, waited_s=waited_s)
            asked.nixl_bytes = self.link.area_bytes if self.link and transfer == 0 else 0
            try:
                await self._pull(spec, asked)
            except FrameInvalid as error:
                self.metrics.counter("kv_refused_total", reason=error.field or "layout").inc()
                _log.warning("pull %d of %s is given up: %s", transfer, spec.key, error.message)
            else:
                return True
        return False

    async def _pull(self, spec: SequenceSpec, asked: attention_pb2.SequenceRequest) -> None:
        prefill: grpc.aio.UnaryStreamMultiCallable[attention_pb2.SequenceRequest, bytes] = self._channel(
            asked.prefill_address
        ).unary_stream(PREFILL_METHOD, request_serializer=attention_pb2.SequenceRequest.SerializeToString)
        call = prefill(asked, metadata=self.handshake.to_metadata())
        fence = Fence(request_id=spec.request_id, attempt=spec.attempt, transfer=asked.transfer)
        receipt = Receipt(self._wanted(spec, first_row=asked.first_wanted_row))
        try:
            await self._take(spec, fence, receipt, aiter(call))
        finally:
            call.cancel()

    async def _take(
        self, spec: SequenceSpec, fence: Fence, receipt: Receipt, frames: AsyncIterator[bytes]
    ) -> None:
        """Stores frames up to the first token.

        Raises:
            FrameInvalid: a frame is not what comes next, or the stream ended early.
            TimeoutError: no frame for the lease.
        """
        while True:
            try:
                async with asyncio.timeout(self.lease_s):
                    data = await anext(frames)
            except StopAsyncIteration:
                raise FrameInvalid(f"{fence} ended without a first token", field="truncated") from None
            item = decode_transfer(fence, data)
            if isinstance(item, PlacedRows):
                item = await self._read(item)
            if isinstance(item, CacheRows):
                receipt.accept_rows(item)
                self.engine.add_rows(spec.key, item)
            elif isinstance(item, NewToken):
                receipt.accept_token(item.token_id)
                self.engine.finish_transfer(spec.key, item)
                return

    async def _read(self, placed: PlacedRows) -> CacheRows:
        """The rows that a prefill worker left where this frame says.

        Raises:
            FrameInvalid: they could not be read in time, or are others.
        """
        if self.link is None:
            raise FrameInvalid("rows over NIXL, which was not asked for", field="kind")
        limit_s = self.lease_s / _READS_PER_LEASE
        try:
            async with asyncio.timeout(limit_s):
                data = await asyncio.wrap_future(self.link.read(placed.place, placed.num_bytes))
        except TimeoutError:
            what = f"{placed.num_bytes} bytes of {placed.place.agent}"
            raise FrameInvalid(f"{what} were not read over NIXL in {limit_s:g} s", field="unread") from None
        return placed.to_rows(data)

    def _wanted(self, spec: SequenceSpec, *, first_row: int) -> Wanted:
        config = self.engine.model
        return Wanted(
            num_layers=config.num_hidden_layers,
            num_optional_layers=config.num_nextn_predict_layers,
            num_tokens=len(spec.token_ids),
            first_row=first_row,
            row_width=self.engine.cache.width,
            row_dtype=self.engine.cache.dtype_name,
            vocab_size=config.vocab_size,
        )

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address]


def _said_by_prefill(error: MorayError) -> MorayError:
    """The error as the router gets it, who must not take a full prefill worker for a full decode worker."""
    if not isinstance(error, Overloaded):
        return error
    return Overloaded(error.message, field=PREFILL_FIELD, retry_after_s=error.retry_after_s)
