"""Kept rows come out in the order in which they went in, and are forgotten when others do not follow them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.hidden_rows import HiddenRows


def rows(begin: int, end: int) -> torch.Tensor:
    """The row of position p is (p, -p)."""
    position_T = torch.arange(begin, end, dtype=torch.float32)
    return torch.stack((position_T, -position_T), dim=1)


@given(
    st.lists(st.tuples(st.sampled_from(["append", "take", "jump", "forget"]), st.integers(1, 5)), max_size=20)
)
def test_rows_are_those_of_their_positions(actions: list[tuple[str, int]]) -> None:
    kept, begin, end = HiddenRows(), 0, 0
    for action, num in actions:
        if action == "append" or (action == "jump" and num > 1):
            first = end if action == "append" else end + num
            begin = first if action == "jump" or begin == end else begin
            kept.append(rows(first, first + num), first_position=first)
            end = first + num
        elif action == "take" and end > begin:
            taken = min(num, end - begin)
            assert torch.equal(kept.take(taken), rows(begin, begin + taken))
            begin += taken
        elif action == "forget" and end > begin:
            kept.keep_newest()
            begin = end - 1
        assert kept.num_rows == end - begin
        assert kept.end_position == end
    if end > begin:
        assert torch.equal(kept.take(end - begin), rows(begin, end))
