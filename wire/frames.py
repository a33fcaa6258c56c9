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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.checksum import add_checksum
from wire.errors import FrameInvalid

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview
Part = bytes | memoryview

_HEADER = struct.Struct("<4sBBHQQiIII")
_TENSOR = struct.Struct("<BBH4I")
_CRC = struct.Struct("<I")
_CRC_AT = struct.calcsize("<4sBBHQQiI")
_MAGIC = b"MRY2"
_MAX_DIMS = 4
_DTYPES = ("float32", "float64", "int32", "int64", "uint8", "uint16")
_DTYPE_CODES = {name: code for code, name in enumerate(_DTYPES)}
_NUMPY_DTYPES = tuple(np.dtype(name).newbyteorder("<") for name in _DTYPES)

FLAG_LOAD_MISSING = 1
"""FORWARD: the worker may load experts that are in none of its slots."""
FLAG_SUMS_FP32 = 2
"""FORWARD: partial sums are wanted in float32."""
FLAG_SUMS_BF16 = 4
"""FORWARD: partial sums are wanted in bfloat16."""


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    FORWARD = 1
    """Rows and who is to compute them; `router.experts.payload` says what tensors."""
    PARTIAL = 2
    """Answer to FORWARD: partial sums (R, D), in the form that its flags asked for."""
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
    flags: int = 0
    """FLAG_* bits."""
    queue_rows: int = 0
    """In an answer: rows that waited at the worker when it was sent."""


def frame_parts(frame: Frame) -> list[Part]:
    """The bytes of a frame as parts to be joined; its arrays are among them, not copied.

    Raises:
        FrameInvalid: a tensor has a dtype or a rank that frames do not carry.
    """
    arrays = [np.ascontiguousarray(array) for array in frame.tensors]
    # `ascontiguousarray` makes a scalar an array of one: the descriptors are of what came in.
    prefix = b"".join([_describe(array) for array in frame.tensors]) + frame.meta
    header = _HEADER.pack(
        _MAGIC, frame.kind, frame.flags, len(arrays), frame.call_id, frame.table_version, frame.layer_idx,
        len(frame.meta), 0, frame.queue_rows,
    )  # fmt: skip
    prefix += bytes(-(len(header) + len(prefix)) % 8)
    crc = zlib.crc32(prefix, zlib.crc32(header))
    body: list[Part] = []
    for array in arrays:
        data = array.reshape(-1).view(np.uint8).data
        crc = add_checksum(data, crc)
        body.append(data)
        if len(data) % 8:
            padding = bytes(-len(data) % 8)
            crc = zlib.crc32(padding, crc)
            body.append(padding)
    return [header[:_CRC_AT] + _CRC.pack(crc) + header[_CRC_AT + _CRC.size :] + prefix, *body]


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
        shapes = [
            _read_descriptor(_TENSOR.unpack_from(data, offset))
            for offset in range(_HEADER.size, descriptors_end, _TENSOR.size)
        ]
        view = memoryview(data)
        before = zlib.crc32(bytes(_CRC.size), zlib.crc32(view[:_CRC_AT]))
        before = zlib.crc32(view[_CRC_AT + _CRC.size : body_begin], before)
        tensors = _read_tensors(view[body_begin:], shapes, before=before, wanted=crc)
        return Frame(
            kind=FrameKind(kind),
            tensors=tensors,
            call_id=call_id,
            table_version=version,
            layer_idx=layer_idx,
            meta=bytes(view[descriptors_end:prefix_end]),
            flags=flags,
            queue_rows=queue_rows,
        )
    except (struct.error, ValueError, IndexError) as error:
        raise FrameInvalid(f"frame of {len(data)} bytes cannot be read: {error}", field="layout") from error


def _describe(array: Array) -> bytes:
    code = _DTYPE_CODES.get(array.dtype.name)
    if code is None or array.ndim > _MAX_DIMS:
        raise FrameInvalid(f"a frame cannot carry {array.dtype.name} of rank {array.ndim}; known: {_DTYPES}")
    return _TENSOR.pack(code, array.ndim, 0, *array.shape, *(0,) * (_MAX_DIMS - array.ndim))


def _read_descriptor(fields: tuple[int, ...]) -> tuple["np.dtype[Any]", tuple[int, ...]]:
    code, num_dims, _, *dims = fields
    if num_dims > _MAX_DIMS:
        raise FrameInvalid(f"a tensor has {num_dims} dimensions; at most {_MAX_DIMS}", field="layout")
    return _NUMPY_DTYPES[code], tuple(dims[:num_dims])


def _read_tensors(
    body: memoryview, shapes: Sequence[tuple["np.dtype[Any]", tuple[int, ...]]], *, before: int, wanted: int
) -> tuple[Array, ...]:
    """Views of the body, its checksum compared on the way."""
    arrays = []
    offset, crc = 0, before
    for dtype, shape in shapes:
        num_bytes = math.prod(shape) * dtype.itemsize
        end, padded_end = offset + num_bytes, offset + num_bytes + (-num_bytes % 8)
        if padded_end > len(body):
            raise FrameInvalid(
                f"frame body of {len(body)} bytes is too short for a {dtype.name} of shape {shape}",
                field="layout",
            )
        crc = zlib.crc32(body[end:padded_end], add_checksum(body[offset:end], crc))
        arrays.append(np.frombuffer(body[offset:end], dtype=dtype).reshape(shape))
        offset = padded_end
    if offset != len(body):
        raise FrameInvalid(
            f"frame body has {len(body) - offset} bytes that no tensor describes", field="layout"
        )
    if crc != wanted:
        raise FrameInvalid(
            f"frame body of {len(body)} bytes: checksum does not match, bytes were damaged on the way",
            field="checksum",
        )
    return tuple(arrays)
