"""The hand-over of cache rows: what arrives is what was sent, and anything else is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.checksum import add_checksum
from wire.errors import FrameInvalid
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from workers.attention.kv_transfer import (
    Alive,
    Fence,
    Place,
    PlacedRows,
    decode_transfer,
    encode_transfer,
)
from workers.attention.types import CacheRows, NewToken

FENCE = Fence(request_id="r1", attempt=2, transfer=1)
ROWS = CacheRows(1, 3, np.arange(8, dtype=np.float32).reshape(2, 4))


PLACED = PlacedRows(
    layer_idx=1,
    first_token_idx=3,
    num_rows=2,
    row_width=4,
    row_dtype="float32",
    place=Place(
        agent="prefill-0-1f",
        agent_metadata=b"how to reach it",
        address=(1 << 47) + 64,
        checksum=add_checksum(ROWS.rows_TB.data.cast("B"), 0),
        ticket=1 << 40,
    ),
)


def header(**fields: Any) -> bytes:
    base = {"request_id": "r1", "attempt": 2, "transfer": 1, "first_token_idx": 3, "num_rows": 2}
    return attention_pb2.KvHeader(**{**base, **fields}).SerializeToString()


def frame(**fields: Any) -> bytes:
    base = Frame(kind=FrameKind.KV, tensors=(ROWS.rows_TB,), layer_idx=1, meta=header())
    return encode_frame(replace(base, **fields))


@given(
    layer_idx=st.integers(0, 60),
    first=st.integers(0, 2**31),
    num_rows=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_rows_arrive_as_they_were_sent(layer_idx: int, first: int, num_rows: int, seed: int) -> None:
    rows_TB = np.random.default_rng(seed).standard_normal((num_rows, 7), dtype=np.float32)
    got = decode_transfer(FENCE, encode_transfer(FENCE, CacheRows(layer_idx, first, rows_TB)))
    assert isinstance(got, CacheRows)
    assert (got.layer_idx, got.first_token_idx) == (layer_idx, first)
    assert got.rows_TB.dtype == np.float32
    np.testing.assert_array_equal(got.rows_TB, rows_TB)


def test_first_token_and_signs_of_life_arrive() -> None:
    for event in (NewToken(99, None), NewToken(99, None, 32), Alive(), PLACED):
        assert decode_transfer(FENCE, encode_transfer(FENCE, event)) == event


def test_every_frame_says_which_pull_it_is_for_and_how_many_rows_it_has() -> None:
    events = (ROWS, PLACED, NewToken(9, None), Alive())
    frames = [decode_frame(encode_transfer(FENCE, event)) for event in events]
    headers = [attention_pb2.KvHeader.FromString(frame.meta) for frame in frames]
    assert [(h.request_id, h.attempt, h.transfer, h.num_rows) for h in headers] == [
        ("r1", 2, 1, 2), ("r1", 2, 1, 2), ("r1", 2, 1, 0), ("r1", 2, 1, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"meta": header(request_id="r2")}, "cache frame of .*'r2'.*, wanted .*'r1'"),
        ({"meta": header(attempt=1)}, "attempt=1.*, wanted .*attempt=2"),
        ({"meta": header(transfer=0)}, "transfer=0.*, wanted .*transfer=1"),
        ({"meta": header(num_rows=3)}, "2 rows, its header says 3"),
        ({"kind": FrameKind.KV_ALIVE}, "does not send KV_ALIVE with 1 tensors"),
        ({"kind": FrameKind.KV_PLACED}, "does not send KV_PLACED with 1 tensors"),
        ({"kind": FrameKind.KV_PLACED, "tensors": ()}, "2 rows of 0 '' cannot be read at ''"),
        ({"meta": b"\xff\xff\xff"}, "KV frame without a KvHeader"),
        ({"kind": FrameKind.SCORES}, "does not send SCORES with 1 tensors"),
        ({"kind": FrameKind.FORWARD}, "does not send FORWARD"),
        ({"tensors": ()}, "does not send KV with 0 tensors"),
        ({"tensors": (ROWS.rows_TB,) * 2}, "does not send KV with 2 tensors"),
        ({"tensors": (ROWS.rows_TB.astype(np.float64),)}, "does not send KV"),
        ({"tensors": (np.float32(1),)}, "does not send KV"),
        ({"tensors": (ROWS.rows_TB[0],)}, "does not send KV"),
        ({"tensors": (ROWS.rows_TB[None],)}, "does not send KV"),
        ({"kind": FrameKind.FIRST_TOKEN}, "does not send FIRST_TOKEN"),
        ({"kind": FrameKind.FIRST_TOKEN, "tensors": (np.zeros(2, np.int32),)}, "does not send FIRST_TOKEN"),
        ({"kind": FrameKind.FIRST_TOKEN, "tensors": (np.full(1, np.nan, np.float32),)}, "FIRST_TOKEN"),
    ],
    ids=str,
)
def test_frame_that_does_not_belong_is_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(FrameInvalid, match=what):
        decode_transfer(FENCE, frame(**fields))


@given(at=st.integers(0, len(frame()) - 1), flip=st.integers(1, 255))
def test_damaged_byte_is_refused(at: int, flip: int) -> None:
    data = bytearray(frame())
    data[at] ^= flip
    with pytest.raises(FrameInvalid):
        decode_transfer(FENCE, bytes(data))


@given(length=st.integers(0, len(frame()) - 1))
def test_shortened_frame_is_refused(length: int) -> None:
    with pytest.raises(FrameInvalid):
        decode_transfer(FENCE, frame()[:length])


@pytest.mark.parametrize(
    "fields", [{"num_rows": 0}, {"row_width": 0}, {"row_dtype": "float64"}, {"row_dtype": "object"}], ids=str
)
def test_place_of_what_is_not_rows_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FrameInvalid, match="cannot be read at 'prefill-0-1f'") as caught:
        decode_transfer(FENCE, encode_transfer(FENCE, replace(PLACED, **fields)))
    assert caught.value.field == "rows"


def test_rows_read_from_their_place_are_those_that_were_left_there() -> None:
    data = ROWS.rows_TB.reshape(-1).view(np.uint8)
    assert PLACED.num_bytes == data.nbytes
    got = PLACED.to_rows(data)
    assert (got.layer_idx, got.first_token_idx, got.rows_TB.dtype) == (1, 3, np.float32)
    np.testing.assert_array_equal(got.rows_TB, ROWS.rows_TB)


@given(at=st.integers(0, PLACED.num_bytes - 1), flip=st.integers(1, 255))
def test_rows_that_others_took_the_place_of_are_refused(at: int, flip: int) -> None:
    data = ROWS.rows_TB.reshape(-1).view(np.uint8).copy()
    data[at] ^= flip
    with pytest.raises(FrameInvalid, match="others lay there") as caught:
        PLACED.to_rows(data)
    assert caught.value.field == "checksum"
