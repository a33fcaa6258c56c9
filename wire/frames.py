"""Raw tensor frames: a fixed header, then bytes; no protobuf around tensors.

Layout, little-endian, everything after the header aligned to 8 bytes:

    header   magic "MRY2" | kind u8 | flags u8 | num_tensors u16 | call_id u64 | table_version u64
             | layer_idx i32 | meta_bytes u32 | checksum u32 (of all bytes but itself) | queue_rows u32
    tensors  num_tensors x (dtype u8 | num_dims u8 | 0 u16 | dims 4 x u32)
    meta     meta_bytes of the kind's own (a small protobuf message, or UTF-8 text of an error)
    body     the tensors' bytes, each padded to 8

A frame of two rows of four float32 values is 40 + 20 (padded to 64) + 32 = 96 bytes.
"""

import enum
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wire.checksum import add_checksum
from wire.errors import FrameInvalid

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview
Part = Buffer

_HEADER = struct.Struct("<4sBBHQQiIII")
_TENSOR = struct.Struct("<BBH4I")
_CRC = struct.Struct("<I")
_CRC_AT = struct.calcsize("<4sBBHQQiI")
_FLAGS_AT = struct.calcsize("<4sB")
_MAGIC = b"MRY2"
_MAX_DIMS = 4
_NUM_SHAPES = 1024
"""Descriptors kept, made and read: calls repeat those of their batch size."""
_DTYPES = ("float32", "float64", "int32", "int64", "uint8", "uint16")
_NUMPY_DTYPES = tuple(np.dtype(name).newbyteorder("<") for name in _DTYPES)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_NUMPY_DTYPES)}
_NO_DIMS = (0,) * _MAX_DIMS
_PADDINGS = tuple(bytes(-num_bytes % 8) for num_bytes in range(8))
_FLAG_BODY_NOT_SUMMED = 128
"""Set and read here: the frame was to stay in the memory of one host."""

FLAG_LOAD_MISSING = 1
"""FORWARD: the worker may load experts that are in none of its slots."""
FLAG_SUMS_FP32 = 2
"""FORWARD: partial sums are wanted in float32."""
FLAG_SUMS_BF16 = 4
"""FORWARD: partial sums are wanted in bfloat16."""
FLAG_PREFILL = 8
"""FORWARD: the rows are of a step of prefill; otherwise of decode."""


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    FORWARD = 1
    """Rows and who is to compute them; `router.experts.payload` says what tensors."""
    PARTIAL = 2
    """Answer to FORWARD: partial sums (R, D), in the form that its flags asked for."""
    ERROR = 3
    """Answer to any call: meta is `ErrorName: message`."""
    KV = 4
    """One layer of finished cache rows, (T, B) float32 or uint8; meta is a KvHeader."""
    FIRST_TOKEN = 5
    """End of a prefill: the first new token, (1,) int32; meta is a KvHeader."""
    SCORES = 6
    """One named tensor of a scoring call; meta is its name."""
    KV_ALIVE = 7
    """A prefill waits its turn, nothing else is to be said; no tensors, meta is a KvHeader."""
    KV_PLACED = 8
    """As KV, without its tensor: meta is a KvHeader that says where the receiver reads the rows over NIXL."""


_KINDS: Mapping[int, FrameKind] = {int(kind): kind for kind in FrameKind}
"""By number: an enumeration looks longer for its members, and names the number that it does not know."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message of a raw stream; arrays are read-only views of the received bytes."""

    kind: FrameKind
    tensors: tuple[Array, ...] = ()
    call_id: int = 0
    """Chosen by the caller, echoed in the answer."""
    table_version: int = 0
    """Routing table that the call was planned with."""
    layer_idx: int = 0
    meta: bytes = b""
    flags: int = 0
    """FLAG_* bits."""
    queue_rows: int = 0
    """In an answer: rows that waited at the worker when it was sent."""


def frame_parts(frame: Frame, *, call_id: int | None = None, is_summed: bool = True) -> list[Part]:
    """The bytes of a frame as parts to be joined; its arrays are among them, not copied.

    Args:
        frame: what is sent.
        call_id: instead of the frame's own.
        is_summed: whether the checksum covers the body, too, and not only what stands before it.

    Raises:
        FrameInvalid: a tensor has a dtype or a rank that frames do not carry.
    """
    head = bytearray(_HEADER.pack(
        _MAGIC, frame.kind, frame.flags if is_summed else frame.flags | _FLAG_BODY_NOT_SUMMED,
        len(frame.tensors), frame.call_id if call_id is None else call_id, frame.table_version,
        frame.layer_idx, len(frame.meta), 0, frame.queue_rows,
    ))  # fmt: skip
    for array in frame.tensors:
        head += _describe(array.dtype, array.shape)
    head += frame.meta
    head += _PADDINGS[len(head) % 8]
    crc = zlib.crc32(head)
    parts: list[Part] = [head]
    for array in frame.tensors:
        if not array.nbytes:
            continue
        data = (array if array.flags.c_contiguous else np.ascontiguousarray(array)).data.cast("B")
        parts.append(data)
        padding = _PADDINGS[len(data) % 8]
        if padding:
            parts.append(padding)
        if is_summed:
            crc = zlib.crc32(padding, add_checksum(data, crc))
    _CRC.pack_into(head, _CRC_AT, crc)
    return parts


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameInvalid: a tensor has a dtype or a rank that frames do not carry.
    """
    return b"".join(frame_parts(frame))


def decode_frame(data: Buffer) -> Frame:
    """The frame in `data`; its arrays are views of it, not copies, and as writable as it.

    Raises:
        FrameInvalid: wrong magic, unknown kind or dtype, wrong length, or a checksum that does not match.
    """
    try:
        magic, kind, flags, num_tensors, call_id, version, layer_idx, meta_bytes, crc, queue_rows = (
            _HEADER.unpack_from(data)
        )
        descriptors_end = _HEADER.size + num_tensors * _TENSOR.size
        prefix_end = descriptors_end + meta_bytes
        body_begin = prefix_end + (-prefix_end % 8)
        if magic != _MAGIC or len(data) < body_begin:
            raise FrameInvalid(
                f"not a Moray frame: {len(data)} bytes starting with {magic!r}", field="layout"
            )
        prefix = bytes(data[:body_begin])
        found = zlib.crc32(prefix[:_CRC_AT] + bytes(_CRC.size) + prefix[_CRC_AT + _CRC.size :])
        tensors, body_end = _read_tensors(data, prefix[_HEADER.size : descriptors_end], begin=body_begin)
        if body_end != len(data):
            raise FrameInvalid(
                f"frame has {len(data) - body_end} bytes that no tensor describes", field="layout"
            )
        if not flags & _FLAG_BODY_NOT_SUMMED:
            found = _sum_body(memoryview(data)[body_begin:], tensors, found)
        if found != crc:
            raise FrameInvalid(
                f"frame of {len(data)} bytes: checksum does not match, bytes were damaged on the way",
                field="checksum",
            )
        return Frame(
            kind=_KINDS.get(kind) or FrameKind(kind),
            tensors=tensors,
            call_id=call_id,
            table_version=version,
            layer_idx=layer_idx,
            meta=prefix[descriptors_end:prefix_end],
            flags=flags & ~_FLAG_BODY_NOT_SUMMED,
            queue_rows=queue_rows,
        )
    except (struct.error, ValueError, IndexError) as error:
        raise FrameInvalid(f"frame of {len(data)} bytes cannot be read: {error}", field="layout") from error


def is_body_summed(data: Buffer) -> bool:
    """Whether the checksum of a frame covers its body, too; of bytes that `decode_frame` has read."""
    return not data[_FLAGS_AT] & _FLAG_BODY_NOT_SUMMED


@lru_cache(maxsize=_NUM_SHAPES)
def _describe(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> bytes:
    code, num_dims = _DTYPE_CODES.get(dtype), len(shape)
    if code is None or num_dims > _MAX_DIMS:
        raise FrameInvalid(f"a frame cannot carry {dtype} of rank {num_dims}; known: {_DTYPES}")
    return _TENSOR.pack(code, num_dims, 0, *shape, *_NO_DIMS[num_dims:])


class _Described(NamedTuple):
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    num_bytes: int


@lru_cache(maxsize=_NUM_SHAPES)
def _read_descriptors(descriptors: bytes) -> tuple[_Described, ...]:
    found = []
    for code, num_dims, _, *dims in _TENSOR.iter_unpack(descriptors):
        if num_dims > _MAX_DIMS:
            raise FrameInvalid(f"a tensor has {num_dims} dimensions; at most {_MAX_DIMS}", field="layout")
        dtype, shape = _NUMPY_DTYPES[code], tuple(dims[:num_dims])
        found.append(_Described(dtype, shape, math.prod(shape) * dtype.itemsize))
    return tuple(found)


def _read_tensors(data: Buffer, descriptors: bytes, *, begin: int) -> tuple[tuple[Array, ...], int]:
    """Views of the body, which begins at `begin`, and where it should end."""
    arrays: list[Array] = []
    for dtype, shape, num_bytes in _read_descriptors(descriptors):
        end = begin + num_bytes + (-num_bytes % 8)
        if end > len(data):
            raise FrameInvalid(
                f"frame of {len(data)} bytes is too short for a {dtype.name} of shape {shape}",
                field="layout",
            )
        arrays.append(np.ndarray(shape, dtype, data, begin) if num_bytes else np.empty(shape, dtype))
        begin = end
    return tuple(arrays), begin


def _sum_body(body: memoryview, tensors: Sequence[Array], crc: int) -> int:
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        crc = add_checksum(body[begin:end], crc)
        begin = end + (-end % 8)
        crc = zlib.crc32(body[end:begin], crc)
    return crc
