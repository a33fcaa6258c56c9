"""Raw frames: what goes in comes out; anything damaged is refused, and only ever as FrameInvalid."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import FrameInvalid
from wire.frames import Frame, FrameKind, decode_frame, encode_frame, frame_parts, is_body_summed

DTYPES = ("float32", "float64", "int32", "int64", "uint8", "uint16")


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


frames = st.builds(
    Frame,
    kind=st.sampled_from(FrameKind),
    tensors=st.lists(arrays(), max_size=4).map(tuple),
    call_id=st.integers(0, 2**64 - 1),
    table_version=st.integers(0, 2**64 - 1),
    layer_idx=st.integers(-(2**31), 2**31 - 1),
    meta=st.binary(max_size=20),
    flags=st.integers(0, 127),
    queue_rows=st.integers(0, 2**32 - 1),
)


def sample() -> bytes:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    return encode_frame(
        Frame(
            kind=FrameKind.FORWARD,
            tensors=(rows, np.array([1, 2, 3], dtype=np.int32)),
            call_id=7,
            table_version=3,
            layer_idx=5,
            meta=b"who",
        )
    )


@given(frames)
def test_frame_comes_back_bit_for_bit(frame):
    got = decode_frame(encode_frame(frame))
    assert replace(got, tensors=()) == replace(frame, tensors=())
    assert [(a.dtype, a.shape, a.tobytes()) for a in got.tensors] == [
        (a.dtype, a.shape, a.tobytes()) for a in frame.tensors
    ]


def test_module_example_has_the_length_that_it_states():
    frame = Frame(kind=FrameKind.PARTIAL, tensors=(np.zeros((2, 4), dtype=np.float32),))
    assert len(encode_frame(frame)) == 96


def test_tensors_are_read_only_views_of_the_bytes():
    tensor = decode_frame(sample()).tensors[0]
    assert not tensor.flags.writeable
    assert not tensor.flags.owndata


def test_array_that_is_not_contiguous_is_carried_by_value():
    array = np.arange(12, dtype=np.int64).reshape(3, 4).T
    (got,) = decode_frame(encode_frame(Frame(kind=FrameKind.SCORES, tensors=(array,)))).tensors
    assert np.array_equal(got, array)


@pytest.mark.parametrize("position", range(len(sample())))
def test_every_damaged_byte_is_refused(position):
    data = sample()
    for value in (0x01, 0x80, 0xFF):
        damaged = bytearray(data)
        damaged[position] ^= value
        with pytest.raises(FrameInvalid):
            decode_frame(bytes(damaged))


@pytest.mark.parametrize("num_bytes", range(len(sample())))
def test_every_truncation_is_refused(num_bytes):
    with pytest.raises(FrameInvalid):
        decode_frame(sample()[:num_bytes])


def test_frame_says_whether_its_body_is_summed():
    for is_summed in (True, False):
        data = bytearray(b"".join(frame_parts(decode_frame(sample()), is_summed=is_summed)))
        assert is_body_summed(data) == is_summed
        data[-1] ^= 1
        if is_summed:
            with pytest.raises(FrameInvalid, match="checksum"):
                decode_frame(data)
        else:
            decode_frame(data)


def test_every_damage_of_a_long_frame_is_refused():
    """Long bodies are summed before the CRC: damaged words, swapped and shifted rows all show."""
    rng = np.random.default_rng(0)
    data = encode_frame(
        Frame(kind=FrameKind.KV, tensors=(rng.integers(0, 256, (64, 1023), dtype=np.uint8), np.arange(9.0)))
    )
    for position in [*rng.integers(0, len(data), 200).tolist(), len(data) - 1, len(data) - 70]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(FrameInvalid):
            decode_frame(damaged)
    begin = len(data) - 64 * 1023 - 80
    for num_bytes in (512, 1024, 4096, 8192):
        swapped = bytearray(data)
        first, second = slice(begin, begin + num_bytes), slice(begin + 16384, begin + 16384 + num_bytes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        with pytest.raises(FrameInvalid, match="checksum"):
            decode_frame(swapped)


def test_arrays_of_a_frame_are_not_copied_into_its_parts():
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = frame_parts(Frame(kind=FrameKind.FORWARD, tensors=(rows,)))
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), rows)
    assert b"".join(parts) == encode_frame(Frame(kind=FrameKind.FORWARD, tensors=(rows,)))


def test_bytes_after_the_end_are_refused():
    with pytest.raises(FrameInvalid):
        decode_frame(sample() + bytes(8))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_frame_invalid(data):
    with pytest.raises(FrameInvalid):
        decode_frame(data)


@given(st.binary(min_size=36, max_size=120), st.integers(0, 3))
def test_forged_frame_with_a_right_checksum_raises_nothing_else(rest, num_tensors):
    head = bytearray(b"MRY2" + bytes((1, 0)) + struct.pack("<H", num_tensors) + rest)
    head[32:36] = bytes(4)
    head[32:36] = struct.pack("<I", zlib.crc32(head))
    try:
        decode_frame(bytes(head))
    except FrameInvalid:
        return


@pytest.mark.parametrize(
    "array", [np.zeros(3, dtype=np.complex64), np.zeros((1, 1, 1, 1, 1), dtype=np.int32)]
)
def test_tensor_that_frames_do_not_carry_is_refused(array):
    with pytest.raises(FrameInvalid, match="cannot carry"):
        encode_frame(Frame(kind=FrameKind.KV, tensors=(array,)))
