import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import DenseCache, LayerCache, Span, make_batch
from model.cache_layout import CacheLayout


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


def test_prompt_lengths_go_to_their_spans() -> None:
    batch = make_batch([[5, 6], [7]], first_positions=[0, 9], prompt_tokens=[2, 4])
    assert batch.spans == (Span(0, 2, 2, 2), Span(2, 3, 10, 4))


def _cache(*, num_layers: int = 1) -> DenseCache:
    """Of rows of three values: latent, rope key, indexer key (of one value, which no kernel takes)."""
    return DenseCache(num_layers=num_layers, layout=CacheLayout(latent=1, rope=1, index=1))


def _rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3)


def _context(cached: LayerCache, span_idx: int) -> list[float]:
    """The first value of a sequence's rows, by position."""
    return cached.rows_NW[cached.context_S[span_idx], 0].tolist()


def test_cache_keeps_sequences_and_layers_apart() -> None:
    cache = _cache(num_layers=2)
    batch = make_batch([[1, 1], [1]], first_positions=[0, 0])
    view = cache.view(batch, [7, 8])
    view.layer(0).append(_rows(0, 1, 2))
    view.layer(1).append(_rows(3, 4, 5))
    contexts = [[_context(view.layer(layer_idx), span_idx) for span_idx in (0, 1)] for layer_idx in (0, 1)]
    assert contexts == [[[0, 1], [2]], [[3, 4], [5]]]


def test_cache_keeps_rows_when_it_grows() -> None:
    cache = _cache()
    first = make_batch([list(range(10))], first_positions=[0])
    cache.view(first).layer(0).append(_rows(*range(10)))
    second = make_batch([list(range(30))], first_positions=[10])
    cached = cache.view(second).layer(0)
    cached.append(_rows(*range(10, 40)))
    assert _context(cached, 0) == list(range(40))


def test_context_is_as_long_as_its_span_says() -> None:
    cache = _cache()
    cache.view(make_batch([[1, 2, 3]], first_positions=[0])).layer(0).append(_rows(1, 2, 3))
    again = cache.view(make_batch([[9]], first_positions=[1])).layer(0)
    assert len(again.context_S[0]) == 2


def test_rows_after_a_rewritten_position_are_forgotten() -> None:
    cache = _cache()
    cache.view(make_batch([[1, 2, 3]], first_positions=[0])).layer(0).append(_rows(1, 2, 3))
    cached = cache.view(make_batch([[9]], first_positions=[1])).layer(0)
    cached.append(_rows(9))
    assert _context(cached, 0) == [1, 9]


def test_gap_in_a_sequence_is_an_error() -> None:
    batch = make_batch([[1]], first_positions=[4])
    with pytest.raises(IndexError, match="sequence 0 has 0 rows, and the batch begins at position 4"):
        _cache().view(batch)
