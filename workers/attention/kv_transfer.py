"""KV hand-over: finished cache rows from a prefill worker to a decode worker, pulled by the decode worker.

The stream of one prefill: KV frames in order (chunk by chunk, each layer of a chunk once), then FIRST_TOKEN.
Every frame carries request id and attempt, so that rows of an older attempt are refused.
"""

from collections.abc import AsyncIterable, AsyncIterator

import numpy as np
from google.protobuf.message import DecodeError

from wire.errors import FrameInvalid
from wire.frames import Array, Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from workers.attention.types import CacheRows, NewToken, SequenceSpec


def encode_transfer(spec: SequenceSpec, event: CacheRows | NewToken) -> bytes:
    """The frame of one event of a prefill."""
    if isinstance(event, CacheRows):
        return _encode(
            spec, FrameKind.KV, event.rows_TW, layer_idx=event.layer_idx, first=event.first_token_idx
        )
    token = np.array([event.token_id], dtype=np.int32)
    return _encode(spec, FrameKind.FIRST_TOKEN, token, layer_idx=0, first=len(spec.token_ids))


def _encode(spec: SequenceSpec, kind: FrameKind, tensor: Array, *, layer_idx: int, first: int) -> bytes:
    header = attention_pb2.KvHeader(request_id=spec.request_id, attempt=spec.attempt, first_token_idx=first)
    frame = Frame(kind=kind, tensors=(tensor,), layer_idx=layer_idx, meta=header.SerializeToString())
    return encode_frame(frame)


def decode_transfer(spec: SequenceSpec, data: bytes) -> CacheRows | int:
    """The rows, or the first token, in a frame of the prefill of `spec`.

    Raises:
        FrameInvalid: damaged, of another request or attempt, or not a frame of a prefill.
    """
    frame = decode_frame(data)
    header = _read_header(frame)
    if (header.request_id, header.attempt) != spec.key:
        raise FrameInvalid(f"cache frame of {header.request_id}/{header.attempt}, wanted {spec.key}")
    tensors = [(t.dtype.name, t.ndim, t.size) for t in frame.tensors]
    if frame.kind is FrameKind.KV and [t[:2] for t in tensors] == [("float32", 2)]:
        return CacheRows(frame.layer_idx, header.first_token_idx, frame.tensors[0])
    if frame.kind is FrameKind.FIRST_TOKEN and tensors == [("int32", 1, 1)]:
        return int(frame.tensors[0][0])
    raise FrameInvalid(f"a prefill does not send {frame.kind.name} with {len(tensors)} tensors {tensors}")


def _read_header(frame: Frame) -> attention_pb2.KvHeader:
    try:
        return attention_pb2.KvHeader.FromString(frame.meta)
    except DecodeError as error:
        raise FrameInvalid(f"{frame.kind.name} frame without a KvHeader: {error}") from error


async def receive_transfer(
    spec: SequenceSpec, stream: AsyncIterable[bytes]
) -> AsyncIterator[CacheRows | int]:
    """Everything that a prefill sends; the first token comes last.

    Raises:
        FrameInvalid: a frame is wrong, or the stream ended before the first token.
    """
    async for data in stream:
        item = decode_transfer(spec, data)
        yield item
        if isinstance(item, int):
            return
    raise FrameInvalid(f"the prefill of {spec.key} ended without a first token")
