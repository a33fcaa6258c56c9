"""The paged cache against the plain one: any pages, any batches, and nobody else's rows."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import DenseCache, make_batch
from model.cache_layout import CacheLayout
from workers.attention.cache import CacheForm, PagedCache

NUM_LAYERS, WIDTH = 2, 3
LAYOUT = CacheLayout(latent=1, rope=1, index=1)


@dataclass(frozen=True)
class Case:
    """Some sequences with pages in any order, and the batches in which they grow."""

    page_tokens: int
    num_pages: int
    pages: list[list[int]]
    steps: list[list[tuple[int, int]]]
    """Per step: (sequence, new tokens), each sequence at most once."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_tokens = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    counts = [-(-length // page_tokens) for length in lengths]
    num_pages = sum(counts) + 2
    shuffled = draw(st.permutations(range(num_pages)))
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    steps = []
    left = list(lengths)
    while any(left):
        chosen = draw(st.permutations([i for i, tokens in enumerate(left) if tokens]))
        chosen = chosen[: draw(st.integers(1, len(chosen)))]
        step = [(i, draw(st.integers(1, left[i]))) for i in chosen]
        for i, num_tokens in step:
            left[i] -= num_tokens
        steps.append(step)
    return Case(page_tokens, num_pages, pages, steps)


def _paged(case: Case) -> PagedCache:
    return PagedCache(
        num_layers=NUM_LAYERS, num_pages=case.num_pages, page_tokens=case.page_tokens, layout=LAYOUT
    )


@given(case=cases(), seed=st.integers(0, 1000))
def test_paged_view_equals_the_dense_cache(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    paged, dense = _paged(case), DenseCache(num_layers=NUM_LAYERS, layout=LAYOUT)
    done = [0] * len(case.pages)
    for step in case.steps:
        batch = make_batch([[0] * n for _, n in step], first_positions=[done[i] for i, _ in step])
        views = paged.view(batch, [case.pages[i] for i, _ in step]), dense.view(batch, [i for i, _ in step])
        for layer_idx in range(NUM_LAYERS):
            rows_TW = torch.randn(batch.num_rows, WIDTH, generator=generator)
            layers = [view.layer(layer_idx) for view in views]
            for layer in layers:
                layer.append(rows_TW)
            got, wanted = ([layer.rows_NW[ids_S] for ids_S in layer.context_S] for layer in layers)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        for i, num_tokens in step:
            done[i] += num_tokens


@given(case=cases())
def test_rows_of_others_are_untouched(case: Case) -> None:
    """Rows outside the batch's own new positions keep a mark, in every layer."""
    paged = _paged(case)
    everything = torch.arange(case.num_pages * case.page_tokens)
    for layer_idx in range(NUM_LAYERS):
        paged.write(layer_idx, everything, torch.full((len(everything), WIDTH), 7.0))
    step = case.steps[0]
    batch = make_batch([[0] * n for _, n in step], first_positions=[0] * len(step))
    paged.view(batch, [case.pages[i] for i, _ in step]).layer(1).append(torch.zeros(batch.num_rows, WIDTH))
    written = {
        case.pages[i][token // case.page_tokens] * case.page_tokens + token % case.page_tokens
        for i, n in step
        for token in range(n)
    }
    is_written = torch.tensor([row in written for row in everything.tolist()])
    assert torch.equal(paged.read(1, everything)[:, 0] == 0.0, is_written)
    assert (paged.read(0, everything) == 7.0).all()


def test_flat_rows_of_pages_out_of_order() -> None:
    cache = PagedCache(num_layers=1, num_pages=6, page_tokens=4, layout=LAYOUT)
    assert cache.flat_rows([5, 0, 2], begin=3, end=9).tolist() == [23, 0, 1, 2, 3, 8]


def test_what_is_read_is_a_copy() -> None:
    cache = PagedCache(num_layers=1, num_pages=1, page_tokens=2, layout=LAYOUT)
    cache.read(0, torch.tensor([0])).fill_(9.0)
    assert cache.read(0, torch.tensor([0])).tolist() == [[0.0] * WIDTH]


@pytest.mark.parametrize("form", ["float32", "fp8"])
def test_copy_of_a_page_is_its_first_rows_in_every_layer(form: CacheForm) -> None:
    layout = CacheLayout(latent=130, rope=2, index=4)
    cache = PagedCache(num_layers=2, num_pages=3, page_tokens=4, layout=layout, form=form)
    for layer_idx in range(2):
        for page in range(3):
            rows_TB = torch.full((4, cache.width), 10 * layer_idx + page)
            cache.write(layer_idx, cache.flat_rows([page], begin=0, end=4), rows_TB.to(cache._rows_LNB.dtype))
    cache.copy_page(2, 1, num_tokens=3)
    held = [cache.read(layer_idx, torch.arange(12))[:, 0].tolist() for layer_idx in range(2)]
    assert held == [[0] * 4 + [2, 2, 2, 1] + [2] * 4, [10] * 4 + [12, 12, 12, 11] + [12] * 4]


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_compact_rows_are_read_and_written_as_they_are_stored(form: CacheForm) -> None:
    layout = CacheLayout(latent=130, rope=2, index=4)
    cache = PagedCache(num_layers=2, num_pages=3, page_tokens=4, layout=layout, form=form)
    assert cache.num_bytes() == 2 * 3 * 4 * cache.width
    batch = make_batch([[0] * 5], first_positions=[0])
    layer = cache.view(batch, [[2, 0]]).layer(1)
    layer.append(torch.randn(5, layout.width))
    assert layer.on_stored is not None
    layer.on_stored()
    assert layer.on_read is not None
    layer.on_read(layer.context_S[0])
    stored_TB = cache.read(1, cache.flat_rows([2, 0], begin=0, end=5))
    assert (stored_TB.dtype, cache.dtype_name) == (torch.uint8, "uint8")
    cache.write(1, cache.flat_rows([1, 2], begin=0, end=5), stored_TB)
    again = cache.view(make_batch([[0]], first_positions=[4]), [[1, 2]]).layer(1)
    assert again.on_read is not None
    again.on_read(again.context_S[0])
    assert torch.equal(again.rows_NW[again.context_S[0]], layer.rows_NW[layer.context_S[0]])


def test_bytes_are_those_of_all_layers_and_pages() -> None:
    layout = CacheLayout(latent=2, rope=2, index=4, key_form="int8")
    assert layout.width == 6
    cache = PagedCache(num_layers=2, num_pages=3, page_tokens=4, layout=layout)
    assert cache.num_bytes() == 2 * 3 * 4 * 6 * 4
