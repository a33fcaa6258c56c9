"""What a decode worker accepts of a hand-over: every row once, in order, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import FrameInvalid
from workers.attention.kv_receipt import Receipt, Wanted
from workers.attention.types import CacheRows

WANTED = Wanted(num_layers=2, num_tokens=40, row_width=3, row_dtype="float32", vocab_size=100)


def rows(layer_idx: int, begin: int, end: int) -> CacheRows:
    return CacheRows(layer_idx, begin, np.zeros((end - begin, 3), np.float32))


def receipt(*accepted: CacheRows) -> Receipt:
    made = Receipt(WANTED)
    for item in accepted:
        made.accept_rows(item)
    return made


BOTH = (rows(0, 0, 40), rows(1, 0, 40))
NEXT = rows(0, 16, 32)
"""What may follow rows [0, 16) of layer 0."""


def test_example_of_the_module() -> None:
    made = receipt(rows(0, 0, 16), rows(0, 16, 40), rows(1, 0, 16), rows(1, 16, 40))
    made.accept_token(7)
    assert made.is_done


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (rows(0, 17, 32), "gap"),
        (rows(0, 32, 40), "gap"),
        (rows(1, 16, 32), "gap"),
        (rows(0, 0, 16), "duplicate"),
        (rows(0, 15, 32), "duplicate"),
        (rows(2, 0, 16), "layer"),
        (rows(-1, 0, 16), "layer"),
        (rows(0, 16, 41), "rows"),
        (rows(0, 16, 16), "rows"),
        (replace(NEXT, rows_TB=NEXT.rows_TB[:, :-1]), "rows"),
        (replace(NEXT, rows_TB=NEXT.rows_TB[0]), "rows"),
        (replace(NEXT, rows_TB=NEXT.rows_TB.astype(np.uint8)), "rows"),
        (replace(NEXT, rows_TB=NEXT.rows_TB[None]), "rows"),
    ],
    ids=str,
)
def test_rows_that_are_not_next_are_refused_and_change_nothing(wrong: CacheRows, reason: str) -> None:
    made = receipt(rows(0, 0, 16))
    with pytest.raises(FrameInvalid) as caught:
        made.accept_rows(wrong)
    assert caught.value.field == reason
    assert made.ends == {0: 16}
    made.accept_rows(NEXT)


@pytest.mark.parametrize(
    ("accepted", "token_id", "what"),
    [
        ((), 5, r"layers \[0, 1\] incomplete"),
        (BOTH[:1], 5, r"layers \[1\] incomplete"),
        ((BOTH[0], rows(1, 0, 39)), 5, r"layers \[1\] incomplete"),
        (BOTH, 100, "first token 100"),
        (BOTH, -1, "first token -1"),
    ],
    ids=str,
)
def test_end_with_rows_missing_or_a_wrong_token_is_refused(
    accepted: tuple[CacheRows, ...], token_id: int, what: str
) -> None:
    made = receipt(*accepted)
    with pytest.raises(FrameInvalid, match=what) as caught:
        made.accept_token(token_id)
    assert caught.value.field == "incomplete"
    assert not made.is_done


def test_rows_begin_where_the_receiver_has_none() -> None:
    made = Receipt(replace(WANTED, first_row=32))
    with pytest.raises(FrameInvalid) as caught:
        made.accept_rows(rows(0, 0, 40))
    assert caught.value.field == "duplicate"
    made.accept_rows(rows(0, 32, 40))
    with pytest.raises(FrameInvalid, match=r"layers \[1\] incomplete"):
        made.accept_token(5)
    made.accept_rows(rows(1, 32, 40))
    made.accept_token(5)


def test_nothing_is_accepted_behind_the_end() -> None:
    made = receipt(*BOTH)
    made.accept_token(5)
    for late in (lambda: made.accept_rows(rows(0, 0, 40)), lambda: made.accept_token(5)):
        with pytest.raises(FrameInvalid) as caught:
            late()
        assert caught.value.field == "late"


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 41), st.integers(0, 12)), max_size=40))
def test_whatever_arrives_each_layer_grows_row_by_row(offers: list[tuple[int, int, int]]) -> None:
    """Every accepted row is the next of its layer, so that an end means that every row was stored once."""
    made, stored = Receipt(WANTED), {0: 0, 1: 0}
    for layer_idx, begin, num_rows in offers:
        try:
            made.accept_rows(rows(layer_idx, begin, begin + num_rows))
        except FrameInvalid:
            continue
        assert begin == stored[layer_idx]
        assert num_rows > 0
        stored[layer_idx] = begin + num_rows
    assert max(stored.values()) <= WANTED.num_tokens
    try:
        made.accept_token(0)
    except FrameInvalid:
        assert min(stored.values()) < WANTED.num_tokens
    else:
        assert set(stored.values()) == {WANTED.num_tokens}


def test_rows_of_an_optional_layer_may_come_and_may_be_missing() -> None:
    made = Receipt(replace(WANTED, num_optional_layers=1))
    for item in (*BOTH, rows(2, 0, 16)):
        made.accept_rows(item)
    with pytest.raises(FrameInvalid, match="duplicate"):
        made.accept_rows(rows(2, 0, 16))
    with pytest.raises(FrameInvalid, match="layer"):
        made.accept_rows(rows(3, 0, 16))
    made.accept_token(7)
    assert made.is_done
