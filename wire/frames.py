"""Raw tensor frames: a fixed header, then bytes; no protobuf around tensors.

Layout, little-endian, everything after the header aligned to 8 bytes:

    header   magic "MRY1" | kind u8 | 0 u8 | num_tensors u16 | call_id u64 | table_version u64
             | layer_idx i32 | meta_bytes u32 | crc32 u32 (of all bytes but itself) | 0 u32
    tensors  num_tensors x (dtype u8 | num_dims u8 | 0 u16 | dims 4 x u32)
    meta     meta_bytes of the kind's own (a small protobuf message, or UTF-8 text of an error)
    body     the tensors' bytes, each padded to 8

A frame of two rows of four float32 values is 40 + 20 (padded to 64) + 32 = 96 bytes.
"""

import enum
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import FrameInvalid

Array = npt.NDArray[Any]

_HEADER = struct.Struct("<4sBBHQQiIII")
_TENSOR = struct.Struct("<BBH4I")
_CRC = struct.Struct("<I")
_CRC_AT = struct.calcsize("<4sBBHQQiI")
_MAGIC = b"MRY1"
_MAX_DIMS = 4
_DTYPES = ("float32", "float64", "int32", "int64", "uint8", "uint16")


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    FORWARD = 1
    """rows (R, D) float32, row_idx (A,) int32, expert_idx (A,) int32, weights (A,) float32."""
    PARTIAL = 2
    """Answer to FORWARD: partial sums (R, D) float64."""
    ERROR = 3
    """Answer to any call: meta is `ErrorName: message`."""
    KV = 4
    """One layer of finished cache rows: (T, W) float32; meta is a KvHeader."""
    FIRST_TOKEN = 5
    """End of a prefill: the first new token, (1,) int32; meta is a KvHeader."""
    SCORES = 6
    """One named tensor of a scoring call; meta is its name."""


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


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameInvalid: a tensor has a dtype or a rank that frames do not carry.
    """
    arrays = [np.asarray(array, order="C") for array in frame.tensors]
    descriptors = b"".join(_describe(array) for array in arrays)
    body = b"".join(part for array in arrays for part in (_bytes_of(array), bytes(-array.nbytes % 8)))
    prefix = descriptors + frame.meta
    header = _HEADER.pack(
        _MAGIC, frame.kind, 0, len(arrays), frame.call_id, frame.table_version, frame.layer_idx,
        len(frame.meta), 0, 0,
    )  # fmt: skip
    padding = bytes(-(len(header) + len(prefix)) % 8)
    crc = zlib.crc32(body, zlib.crc32(header + prefix + padding))
    return b"".join((header[:_CRC_AT], _CRC.pack(crc), header[_CRC_AT + _CRC.size :], prefix, padding, body))


def decode_frame(data: bytes) -> Frame:
    """The frame in `data`; its arrays are views of it, not copies.

    Raises:
        FrameInvalid: wrong magic, unknown kind or dtype, wrong length, or a checksum that does not match.
    """
    try:
        magic, kind, _, num_tensors, call_id, version, layer_idx, meta_bytes, crc, _ = _HEADER.unpack_from(
            data
        )
        descriptors_end = _HEADER.size + num_tensors * _TENSOR.size
        shapes = [
            _TENSOR.unpack_from(data, offset) for offset in range(_HEADER.size, descriptors_end, _TENSOR.size)
        ]
        prefix_end = descriptors_end + meta_bytes
        body_begin = prefix_end + (-prefix_end % 8)
        view = memoryview(data)
        if magic != _MAGIC or len(data) < body_begin:
            raise FrameInvalid(f"not a Moray frame: {len(data)} bytes starting with {magic!r}")
        if _checksum(view) != crc:
            raise FrameInvalid(
                f"frame of {len(data)} bytes: checksum does not match, bytes were damaged on the way"
            )
        return Frame(
            kind=FrameKind(kind),
            tensors=_read_tensors(view[body_begin:], shapes),
            call_id=call_id,
            table_version=version,
            layer_idx=layer_idx,
            meta=bytes(view[descriptors_end:prefix_end]),
        )
    except (struct.error, ValueError, IndexError) as error:
        raise FrameInvalid(f"frame of {len(data)} bytes cannot be read: {error}") from error


def _checksum(view: memoryview) -> int:
    """CRC-32 of the whole frame, its own field taken as zero."""
    before = zlib.crc32(bytes(_CRC.size), zlib.crc32(view[:_CRC_AT]))
    return zlib.crc32(view[_CRC_AT + _CRC.size :], before)


def _describe(array: Array) -> bytes:
    if array.dtype.name not in _DTYPES or array.ndim > _MAX_DIMS:
        raise FrameInvalid(f"a frame cannot carry {array.dtype.name} of rank {array.ndim}; known: {_DTYPES}")
    dims = (*array.shape, *(0,) * (_MAX_DIMS - array.ndim))
    return _TENSOR.pack(_DTYPES.index(array.dtype.name), array.ndim, 0, *dims)


def _bytes_of(array: Array) -> bytes:
    return array.tobytes()


def _read_tensors(body: memoryview, shapes: list[tuple[int, ...]]) -> tuple[Array, ...]:
    arrays = []
    offset = 0
    for code, num_dims, _, *dims in shapes:
        dtype = np.dtype(_DTYPES[code])
        shape = tuple(dims[:num_dims])
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if num_dims > _MAX_DIMS or offset + num_bytes > len(body):
            raise FrameInvalid(
                f"frame body of {len(body)} bytes is too short for a {dtype.name} of shape {shape}"
            )
        arrays.append(np.frombuffer(body[offset : offset + num_bytes], dtype=dtype).reshape(shape))
        offset += num_bytes + (-num_bytes % 8)
    if offset != len(body):
        raise FrameInvalid(f"frame body has {len(body) - offset} bytes that no tensor describes")
    return tuple(arrays)
