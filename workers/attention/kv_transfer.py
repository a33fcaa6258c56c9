"""The frames of a hand-over: finished cache rows from a prefill worker to a decode worker that pulls them.

The stream of one pull: KV frames (chunk by chunk, each layer of a chunk once, sent while later layers are
computed), then FIRST_TOKEN; KV_ALIVE between them where there is nothing to send. Every frame carries the
request id, the attempt and the number of the pull: the fence, which keeps out what an older pull still sends.
In place of a KV frame there may be a KV_PLACED one, which says where the receiver reads the rows over NIXL.
"""

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from wire.checksum import add_checksum
from wire.errors import FrameInvalid
from wire.frames import Array, Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from workers.attention.types import CacheRows, NewToken

_DTYPES = ("float32", "uint8")
"""Of stored rows."""


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows lie, and who they are read from."""

    agent: str
    """Name of an agent of NIXL; no two processes have the same."""
    agent_metadata: bytes = b""
    """What another agent must know of it; in the first place of a stream."""
    address: int
    checksum: int
    """Of the rows' bytes: somebody may have written others there in the meantime."""
    ticket: int
    """What the agent is told when the rows were read."""


@dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """Finished cache rows of one layer that the receiver has to read."""

    layer_idx: int
    first_token_idx: int
    num_rows: int
    row_width: int
    """B, places of a stored row."""
    row_dtype: str
    """Of a place: float32 or uint8."""
    place: Place

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return self.num_rows * self.row_width * np.dtype(self.row_dtype).itemsize

    def to_rows(self, data: Array) -> CacheRows:
        """The rows, from their bytes (num_bytes,) uint8 as they were read.

        Raises:
            FrameInvalid: they are not what was left there.
        """
        if add_checksum(data.data, 0) != self.place.checksum:
            what = f"{self.num_rows} rows of layer {self.layer_idx} from {self.place.agent}"
            raise FrameInvalid(f"{what}: others lay there when they were read", field="checksum")
        rows_TB = data.view(self.row_dtype).reshape(self.num_rows, self.row_width)
        return CacheRows(self.layer_idx, self.first_token_idx, rows_TB)


def encode_transfer(fence: Fence, event: CacheRows | PlacedRows | NewToken | Alive) -> bytes:
    """The frame of one event of a prefill."""
    header = attention_pb2.KvHeader(
        request_id=fence.request_id, attempt=fence.attempt, transfer=fence.transfer
    )
    if isinstance(event, Alive):
        return _encode(header, FrameKind.KV_ALIVE)
    if isinstance(event, NewToken):
        header.num_cached_tokens = event.num_cached_tokens
        return _encode(header, FrameKind.FIRST_TOKEN, np.array([event.token_id], dtype=np.int32))
    header.first_token_idx = event.first_token_idx
    if isinstance(event, CacheRows):
        header.num_rows = len(event.rows_TB)
        return _encode(header, FrameKind.KV, event.rows_TB, layer_idx=event.layer_idx)
    place = event.place
    header.num_rows = event.num_rows
    header.place.CopyFrom(
        attention_pb2.KvPlace(
            agent=place.agent,
            agent_metadata=place.agent_metadata,
            address=place.address,
            checksum=place.checksum,
            ticket=place.ticket,
            row_width=event.row_width,
            row_dtype=event.row_dtype,
        )
    )
    return _encode(header, FrameKind.KV_PLACED, layer_idx=event.layer_idx)


def _encode(header: attention_pb2.KvHeader, kind: FrameKind, *tensors: Array, layer_idx: int = 0) -> bytes:
    return encode_frame(
        Frame(kind=kind, tensors=tensors, layer_idx=layer_idx, meta=header.SerializeToString())
    )


def decode_transfer(fence: Fence, data: bytes) -> CacheRows | PlacedRows | NewToken | Alive:
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
    if frame.kind is FrameKind.KV and [t[:2] for t in tensors] in [[(dtype, 2)] for dtype in _DTYPES]:
        rows_TB = frame.tensors[0]
        if len(rows_TB) != header.num_rows:
            raise FrameInvalid(f"{len(rows_TB)} rows, its header says {header.num_rows}", field="rows")
        return CacheRows(frame.layer_idx, header.first_token_idx, rows_TB)
    if frame.kind is FrameKind.KV_PLACED and not tensors:
        return _read_placed(frame.layer_idx, header)
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


def _read_placed(layer_idx: int, header: attention_pb2.KvHeader) -> PlacedRows:
    place = header.place
    if not header.num_rows or not place.row_width or place.row_dtype not in _DTYPES:
        what = f"{header.num_rows} rows of {place.row_width} {place.row_dtype!r}"
        raise FrameInvalid(f"{what} cannot be read at {place.agent!r}", field="rows")
    return PlacedRows(
        layer_idx=layer_idx,
        first_token_idx=header.first_token_idx,
        num_rows=header.num_rows,
        row_width=place.row_width,
        row_dtype=place.row_dtype,
        place=Place(
            agent=place.agent,
            agent_metadata=place.agent_metadata,
            address=place.address,
            checksum=place.checksum,
            ticket=place.ticket,
        ),
    )
