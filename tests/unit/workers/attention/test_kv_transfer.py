"""The hand-over of cache rows: what arrives is what was sent, and anything else is refused."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import make_spec
from wire.errors import FrameInvalid
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from workers.attention.kv_transfer import decode_transfer, encode_transfer, receive_transfer
from workers.attention.types import CacheRows, NewToken

SPEC = make_spec([5, 6, 7], request_id="r1", attempt=2)
ROWS = CacheRows(1, 3, np.arange(8, dtype=np.float32).reshape(2, 4))


def header(request_id: str = "r1", attempt: int = 2, first: int = 3) -> bytes:
    message = attention_pb2.KvHeader(request_id=request_id, attempt=attempt, first_token_idx=first)
    return message.SerializeToString()


def frame(**fields: Any) -> bytes:
    base = Frame(kind=FrameKind.KV, tensors=(ROWS.rows_TW,), layer_idx=1, meta=header())
    return encode_frame(replace(base, **fields))


@given(
    layer_idx=st.integers(0, 60),
    first=st.integers(0, 2**31),
    num_rows=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_rows_arrive_as_they_were_sent(layer_idx: int, first: int, num_rows: int, seed: int) -> None:
    rows_TW = np.random.default_rng(seed).standard_normal((num_rows, 7), dtype=np.float32)
    got = decode_transfer(SPEC, encode_transfer(SPEC, CacheRows(layer_idx, first, rows_TW)))
    assert isinstance(got, CacheRows)
    assert (got.layer_idx, got.first_token_idx) == (layer_idx, first)
    assert got.rows_TW.dtype == np.float32
    np.testing.assert_array_equal(got.rows_TW, rows_TW)


def test_first_token_arrives_behind_the_prompt() -> None:
    data = encode_transfer(SPEC, NewToken(99, None))
    assert decode_transfer(SPEC, data) == 99
    assert attention_pb2.KvHeader.FromString(decode_frame(data).meta).first_token_idx == 3


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"meta": header(request_id="r2")}, r"cache frame of r2/2, wanted \('r1', 2\)"),
        ({"meta": header(attempt=1)}, "cache frame of r1/1"),
        ({"meta": b"\xff\xff\xff"}, "KV frame without a KvHeader"),
        ({"kind": FrameKind.SCORES}, "does not send SCORES with 1 tensors"),
        ({"kind": FrameKind.FORWARD}, "does not send FORWARD"),
        ({"tensors": ()}, "does not send KV with 0 tensors"),
        ({"tensors": (ROWS.rows_TW,) * 2}, "does not send KV with 2 tensors"),
        ({"tensors": (ROWS.rows_TW.astype(np.float64),)}, "does not send KV"),
        ({"tensors": (np.float32(1),)}, "does not send KV"),
        ({"tensors": (ROWS.rows_TW[0],)}, "does not send KV"),
        ({"tensors": (ROWS.rows_TW[None],)}, "does not send KV"),
        ({"kind": FrameKind.FIRST_TOKEN}, "does not send FIRST_TOKEN"),
        ({"kind": FrameKind.FIRST_TOKEN, "tensors": (np.zeros(2, np.int32),)}, "does not send FIRST_TOKEN"),
        ({"kind": FrameKind.FIRST_TOKEN, "tensors": (np.full(1, np.nan, np.float32),)}, "FIRST_TOKEN"),
    ],
    ids=str,
)
def test_frame_that_does_not_belong_is_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(FrameInvalid, match=what):
        decode_transfer(SPEC, frame(**fields))


@given(at=st.integers(0, len(frame()) - 1), flip=st.integers(1, 255))
def test_damaged_byte_is_refused(at: int, flip: int) -> None:
    data = bytearray(frame())
    data[at] ^= flip
    with pytest.raises(FrameInvalid):
        decode_transfer(SPEC, bytes(data))


@given(length=st.integers(0, len(frame()) - 1))
def test_shortened_frame_is_refused(length: int) -> None:
    with pytest.raises(FrameInvalid):
        decode_transfer(SPEC, frame()[:length])


def receive(*items: bytes) -> tuple[list[object], bool]:
    """What `receive_transfer` yields, and whether it read the stream to its end."""
    is_read_to_the_end = False

    async def stream() -> AsyncIterator[bytes]:
        nonlocal is_read_to_the_end
        for item in items:
            yield item
        is_read_to_the_end = True

    async def run() -> list[object]:
        return [item async for item in receive_transfer(SPEC, stream())]

    return asyncio.run(run()), is_read_to_the_end


def test_stream_is_read_up_to_the_first_token() -> None:
    first, second = replace(ROWS, first_token_idx=0), replace(ROWS, first_token_idx=2)
    sent = [encode_transfer(SPEC, event) for event in (first, second, NewToken(8, None), ROWS)]
    got, is_read_to_the_end = receive(*sent)
    assert [item.first_token_idx for item in got[:2]] == [0, 2]
    assert got[2:] == [8]
    assert not is_read_to_the_end


@pytest.mark.parametrize("num_rows_frames", [0, 2])
def test_stream_that_ends_early_is_refused(num_rows_frames: int) -> None:
    with pytest.raises(FrameInvalid, match="ended without a first token"):
        receive(*[encode_transfer(SPEC, ROWS)] * num_rows_frames)


def test_wrong_frame_in_the_middle_ends_the_stream() -> None:
    with pytest.raises(FrameInvalid, match="cache frame of r1/1"):
        receive(encode_transfer(SPEC, ROWS), frame(meta=header(attempt=1)))
