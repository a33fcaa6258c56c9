"""Pieces of an area never overlap, and what is given back can be lent again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.byte_ranges import ByteRanges


def test_pieces_lie_where_the_docstring_says() -> None:
    ranges = ByteRanges(256)
    assert [ranges.lend(num_bytes) for num_bytes in (70, 50, 10)] == [0, 128, 192]
    ranges.give_back(0)
    assert ranges.lend(129) is None
    assert ranges.lend(100) == 0
    assert ranges.num_lent == 3


@pytest.mark.parametrize("num_bytes", [0, -1, 257])
def test_what_is_no_piece_of_the_area_is_not_lent(num_bytes: int) -> None:
    assert ByteRanges(256).lend(num_bytes) is None


def test_piece_is_given_back_once() -> None:
    ranges = ByteRanges(256)
    ranges.lend(1)
    ranges.give_back(0)
    with pytest.raises(KeyError):
        ranges.give_back(0)


@given(st.lists(st.tuples(st.integers(1, 700), st.booleans()), max_size=40))
def test_pieces_never_overlap(steps: list[tuple[int, bool]]) -> None:
    ranges = ByteRanges(2048)
    lent: list[int] = []
    for num_bytes, gives_back in steps:
        begin = ranges.lend(num_bytes)
        if begin is not None:
            lent.append(begin)
        if gives_back and lent:
            ranges.give_back(lent.pop(0))
        ranges.check_integrity()
    for begin in lent:
        ranges.give_back(begin)
    assert ranges.lend(2048) == 0


def test_overlapping_pieces_are_found() -> None:
    with pytest.raises(RuntimeError, match=r"bytes \[64, 192\) lie outside or are lent twice"):
        ByteRanges(256, {0: 128, 64: 192}).check_integrity()
