import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import DenseCache, Span, make_batch


def test_docstring_example() -> None:
    batch = make_batch([[5, 6], [7]], first_positions=[0, 9])
    assert batch.position_ids_T.tolist() == [0, 1, 9]
    assert batch.spans == (Span(0, 2, 2), Span(2, 3, 10))
    assert batch.num_rows == 3


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 100)), min_size=1, max_size=6))
def test_spans_cover_all_rows_in_order(parts: list[tuple[int, int]]) -> None:
    batch = make_batch([[0] * n for n, _ in parts], first_positions=[first for _, first in parts])
    assert [span.begin_row for span in batch.spans] == [0, *(span.end_row for span in batch.spans[:-1])]
    assert batch.spans[-1].end_row == batch.num_rows
    assert [(span.num_rows, span.first_position) for span in batch.spans] == parts


def test_cache_keeps_sequences_apart() -> None:
    cache = DenseCache(num_layers=1, width=2)
    batch = make_batch([[1, 1], [1]], first_positions=[0, 0])
    view = cache.view(batch, [7, 8])
    view.append(0, torch.arange(6.0).view(3, 2))
    assert view.context(0, 0).tolist() == [[0, 1], [2, 3]]
    assert view.context(0, 1).tolist() == [[4, 5]]


def test_rows_after_a_rewritten_position_are_forgotten() -> None:
    cache = DenseCache(num_layers=1, width=1)
    first = make_batch([[1, 2, 3]], first_positions=[0])
    cache.view(first).append(0, torch.tensor([[1.0], [2.0], [3.0]]))
    again = make_batch([[9]], first_positions=[1])
    cache.view(again).append(0, torch.tensor([[9.0]]))
    assert cache.view(again).context(0, 0).tolist() == [[1], [9]]


def test_gap_in_a_sequence_is_an_error() -> None:
    batch = make_batch([[1]], first_positions=[4])
    with pytest.raises(IndexError, match="has 0 rows in layer 0, and the batch begins at position 4"):
        DenseCache(num_layers=1, width=1).view(batch).append(0, torch.zeros(1, 1))
