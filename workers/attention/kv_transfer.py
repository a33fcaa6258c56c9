"""The frames of a hand-over: finished cache rows from a prefill worker to a decode worker that pulls them.

The stream of one pull: KV frames (chunk by chunk, each layer of a chunk once, sent while later layers are
computed), then FIRST_TOKEN; KV_ALIVE between them where there is nothing to send. Every frame carries the
request id, the attempt and the number of the pull: the fence, which keeps out what an older pull still sends.
"""

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from wire.errors import FrameInvalid
from wire.frames import Array, Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from workers.attention.types import CacheRows, NewToken

_ROWS = ([("float32", 2)], [("uint8", 2)])
"""One tensor of stored rows, in either of their forms."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """Which pull a frame belongs to."""

    request_id: str
    attempt: int
    transfer: int
    """Pulls of this attempt before this one."""


@dataclass(frozen=True)
class Alive:
    """The prefill worker is there, and the request waits or is computed."""


def encode_transfer(fence: Fence, event: CacheRows | NewToken | Alive) -> bytes:
    """The frame of one event of a prefill."""
    if isinstance(event, CacheRows):
        return _encode(
            fence, FrameKind.KV, event.rows_TB, layer_idx=event.layer_idx, first=event.first_token_idx
        )
    if isinstance(event, Alive):
        return _encode(fence, FrameKind.KV_ALIVE, None)
    token = np.array([event.token_id], dtype=np.int32)
    return _encode(fence, FrameKind.FIRST_TOKEN, token, num_cached_tokens=event.num_cached_tokens)


def _encode(
    fence: Fence,
    kind: FrameKind,
    tensor: Array | None,
    *,
    layer_idx: int = 0,
    first: int = 0,
    num_cached_tokens: int = 0,
) -> bytes:
    header = attention_pb2.KvHeader(
        request_id=fence.request_id,
        attempt=fence.attempt,
        transfer=fence.transfer,
        first_token_idx=first,
        num_rows=len(tensor) if tensor is not None and kind is FrameKind.KV else 0,
        num_cached_tokens=num_cached_tokens,
    )
    tensors = () if tensor is None else (tensor,)
    return encode_frame(
        Frame(kind=kind, tensors=tensors, layer_idx=layer_idx, meta=header.SerializeToString())
    )


def decode_transfer(fence: Fence, data: bytes) -> CacheRows | NewToken | Alive:
    """What a frame of the pull says.

    Raises:
        FrameInvalid: damaged, of another request, attempt or pull, or not a frame of a prefill; its field
            names the reason.
    """
    frame = decode_frame(data)
    header = _read_header(frame)
    got = Fence(request_id=header.request_id, attempt=header.attempt, transfer=header.transfer)
    if got != fence:
        raise FrameInvalid(f"cache frame of {got}, wanted {fence}", field="fence")
    tensors = [(t.dtype.name, t.ndim, t.size) for t in frame.tensors]
    if frame.kind is FrameKind.KV and [t[:2] for t in tensors] in _ROWS:
        rows_TB = frame.tensors[0]
        if len(rows_TB) != header.num_rows:
            raise FrameInvalid(f"{len(rows_TB)} rows, its header says {header.num_rows}", field="rows")
        return CacheRows(frame.layer_idx, header.first_token_idx, rows_TB)
    if frame.kind is FrameKind.FIRST_TOKEN and tensors == [("int32", 1, 1)]:
        return NewToken(int(frame.tensors[0][0]), None, header.num_cached_tokens)
    if frame.kind is FrameKind.KV_ALIVE and not tensors:
        return Alive()
    raise FrameInvalid(
        f"a prefill does not send {frame.kind.name} with {len(tensors)} tensors {tensors}", field="kind"
    )


def _read_header(frame: Frame) -> attention_pb2.KvHeader:
    try:
        return attention_pb2.KvHeader.FromString(frame.meta)
    except DecodeError as error:
        message = f"{frame.kind.name} frame without a KvHeader: {error}"
        raise FrameInvalid(message, field="header") from error
