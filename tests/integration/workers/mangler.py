"""A prefill worker that lies: it stands before a real one and changes what that one sends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.integration.workers.lab import HOST, Cluster
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from wire.rpc import ATTENTION_FRAMES, PREFILL_METHOD, SERVER_OPTIONS

Mangle = Callable[[list[bytes]], list[bytes]]
"""What is sent instead of the frames of a prefill."""


@dataclass
class Mangler:
    """Changes the frames of its first `num_lies` calls."""

    cluster: Cluster
    mangle: Mangle
    num_lies: int = 1
    is_stalling: bool = False
    """Whether a call that was lied to is left open after the last frame."""
    address: str = ""
    transfers: list[int] = field(default_factory=list)
    """The pulls that it was asked for."""
    deadlines_ms: list[int] = field(default_factory=list)
    """What each of them said is left of its client's deadline."""
    num_ended: int = 0
    """Calls that are over."""

    async def start(self) -> grpc.aio.Server:
        """Listens; the caller stops it."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
            self._prefill, request_deserializer=attention_pb2.SequenceRequest.FromString
        )
        handlers = grpc.method_handlers_generic_handler(ATTENTION_FRAMES, {"Prefill": handler})
        server.add_generic_rpc_handlers((handlers,))
        self.address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
        await server.start()
        return server

    async def _prefill(self, request: attention_pb2.SequenceRequest, context: Any) -> None:
        is_lie = len(self.transfers) < self.num_lies
        self.transfers.append(request.transfer)
        self.deadlines_ms.append(request.deadline_ms)
        call = self.cluster.channel(self.cluster.attention["prefill-0"]).unary_stream(
            PREFILL_METHOD, request_serializer=attention_pb2.SequenceRequest.SerializeToString
        )
        answer = call(request, metadata=self.cluster.handshake.to_metadata())
        try:
            frames = await _up_to_token(answer)
            for data in self.mangle(frames) if is_lie else frames:
                await context.write(data)
            if is_lie and self.is_stalling:
                await asyncio.Event().wait()
        finally:
            answer.cancel()
            self.num_ended += 1


async def _up_to_token(answer: Any) -> list[bytes]:
    """The frames of a prefill; its call stays open, for rows that are still to be read elsewhere."""
    frames: list[bytes] = []
    while not frames or decode_frame(frames[-1]).kind is not FrameKind.FIRST_TOKEN:
        frames.append(await answer.read())
    return frames


@contextlib.asynccontextmanager
async def lying_prefill(cluster: Cluster, mangle: Mangle, **fields: Any) -> AsyncIterator[Mangler]:
    """A running mangler."""
    mangler = Mangler(cluster, mangle, **fields)
    server = await mangler.start()
    try:
        yield mangler
    finally:
        await server.stop(0)


def kv_at(frames: list[bytes]) -> list[int]:
    """Indices of the frames with rows, or with their place."""
    kinds = (FrameKind.KV, FrameKind.KV_PLACED)
    return [i for i, data in enumerate(frames) if decode_frame(data).kind in kinds]


def change(data: bytes, **header: int) -> bytes:
    """A frame with another header, and a checksum that fits."""
    frame = decode_frame(data)
    fields = attention_pb2.KvHeader.FromString(frame.meta)
    for name, value in header.items():
        setattr(fields, name, value)
    return encode_frame(
        Frame(
            kind=frame.kind, tensors=frame.tensors, layer_idx=frame.layer_idx, meta=fields.SerializeToString()
        )
    )


def move(data: bytes, *, layer_idx: int) -> bytes:
    """A frame of rows that says another layer."""
    frame = decode_frame(data)
    return encode_frame(Frame(kind=frame.kind, tensors=frame.tensors, layer_idx=layer_idx, meta=frame.meta))
