"""The indexer: scores of cached keys, and the positions that are chosen of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import LayerCache
from model.cache_layout import KeyForm
from model.config import INDEXER_NORM_EPS
from model.kernels.base import CacheNorms, Kernels, Reads
from model.kernels.plain import TorchKernels
from model.matrix import StoredMatrix
from model.rope import RopeTable
from tests.reference_data import unit_parameters, unit_tensors
from tests.unit.model.kernels.cases import assert_near, cache_of, layout_of, random, rope_table, shuffled

INT8_KEY_ERROR = 2e-2
"""What rounding queries and keys to 127 codes costs a score, in units of the largest score."""


def _visible(reads: Reads) -> Tensor:
    """(R, S) bool."""
    seen_RS = torch.ones(reads.num_rows, len(reads.context_S), dtype=torch.bool)
    return seen_RS.tril(reads.first_position)


def _golden_scores(kernels: Kernels) -> Tensor:
    """(48, 48) scores of the golden's inputs; the rope part of the cache row is not looked at."""
    units, given_values = unit_tensors(), unit_parameters()["indexer"]
    table = RopeTable(cos_TP=units["indexer.cos"], sin_TP=units["indexer.sin"])
    x, q = units["indexer.x"][0], units["indexer.qr"][0]
    num_heads, width, rope = (
        given_values[k] for k in ("index_n_heads", "index_head_dim", "qk_rope_head_dim")
    )
    query_b, key_b, head_b = (
        kernels.pack(StoredMatrix(values_FD=units[f"indexer.{name}"]), "float32")
        for name in ("wq_b", "wk", "weights_proj")
    )
    norms = CacheNorms(
        latent_C=torch.ones(4),
        key_I=units["indexer.k_norm.weight"],
        key_bias_I=units["indexer.k_norm.bias"],
        eps=INDEXER_NORM_EPS,
    )
    cached = cache_of(len(x), layout=layout_of(latent=4, rope=rope, index=width))
    kernels.store_rows(torch.zeros(len(x), 4 + rope), key_b(x), norms, table, cached)
    query_RJI = kernels.rotate_index_queries(query_b(q).view(-1, num_heads, width), table)
    head_RJ = head_b(x) * (num_heads**-0.5 * width**-0.5)
    reads = Reads(begin_row=0, end_row=len(x), first_position=0, context_S=torch.arange(len(x)))
    return kernels.index_scores(query_RJI, head_RJ, cached, reads)


def test_scores_equal_the_golden(kernels: Kernels) -> None:
    visible = torch.ones(48, 48, dtype=torch.bool).tril()
    assert_near(_golden_scores(kernels)[visible], unit_tensors()["indexer.exact.scores"][visible])


def test_selected_positions_equal_the_golden(kernels: Kernels) -> None:
    golden = unit_tensors()["indexer.exact.topk"][10:].long().sort(-1).values
    scores = _golden_scores(kernels)[10:].contiguous()
    assert torch.equal(kernels.select_positions(scores, first_position=10, num_selected=10), golden)


def _case(
    num_rows: int, first_position: int, *, num_heads: int, width: int, key_form: KeyForm
) -> tuple[Tensor, Tensor, LayerCache, Reads]:
    """Queries, head weights, a cache whose keys were stored by torch, and what the rows read of it."""
    num_seen = first_position + num_rows
    layout = layout_of(key_form, latent=8, rope=8, index=width)
    context = shuffled(num_seen, seed=1)
    cached = cache_of(2 * num_seen, layout=layout, append_T=context)
    norms = CacheNorms(
        latent_C=torch.ones(8), key_I=random(width, seed=2), key_bias_I=random(width, seed=3), eps=1e-6
    )
    rows, key, table = (
        random(num_seen, 16, seed=4),
        random(num_seen, width, seed=5),
        rope_table(num_seen, 8, seed=6),
    )
    TorchKernels().store_rows(rows, key, norms, table, cached)
    query, head = random(num_rows, num_heads, width, seed=7), random(num_rows, num_heads, seed=8)
    reads = Reads(begin_row=0, end_row=num_rows, first_position=first_position, context_S=context)
    return query, head, cached, reads


def _scores(query: Tensor, head: Tensor, key_SI: Tensor) -> Tensor:
    """The formula in float64."""
    product_RJS = torch.einsum("rji,si->rjs", query.double(), key_SI.double()).relu()
    return torch.einsum("rjs,rj->rs", product_RJS, head.double())


CASES = ((1, 0), (1, 63), (3, 64), (20, 100), (2, 1030))
"""Rows and their first position: steps of 64 keys and parts of 1024, whole and broken."""


@pytest.mark.parametrize(("num_heads", "width"), [(1, 8), (6, 16), (16, 32), (20, 128)])
@pytest.mark.parametrize(("num_rows", "first_position"), CASES)
def test_scores_are_weighted_sums_over_heads(
    kernels: Kernels, num_rows: int, first_position: int, num_heads: int, width: int
) -> None:
    query, head, cached, reads = _case(
        num_rows, first_position, num_heads=num_heads, width=width, key_form="float32"
    )
    expected = _scores(query, head, cached.rows_NW[reads.context_S, cached.layout.key_begin :])
    visible = _visible(reads)
    assert_near(kernels.index_scores(query, head, cached, reads)[visible], expected[visible])


@pytest.mark.parametrize(("num_heads", "width"), [(1, 8), (6, 16), (16, 32), (20, 128)])
@pytest.mark.parametrize(("num_rows", "first_position"), CASES)
def test_scores_of_int8_keys_are_those_of_torch(
    kernels: Kernels, num_rows: int, first_position: int, num_heads: int, width: int
) -> None:
    """Both round the same queries to the same codes, whose products are whole numbers."""
    case = _case(num_rows, first_position, num_heads=num_heads, width=width, key_form="int8")
    visible = _visible(case[-1])
    got, expected = (k.index_scores(*case)[visible] for k in (kernels, TorchKernels()))
    assert_near(got, expected)


def test_scores_of_int8_keys_are_near_those_of_the_keys(kernels: Kernels) -> None:
    case = _case(20, 100, num_heads=16, width=128, key_form="int8")
    query, head, of_keys, reads = _case(20, 100, num_heads=16, width=128, key_form="float32")
    visible = _visible(reads)
    expected = _scores(query, head, of_keys.rows_NW[reads.context_S, of_keys.layout.key_begin :])
    assert_near(kernels.index_scores(*case)[visible], expected[visible], tolerance=INT8_KEY_ERROR)


def test_docstring_example(kernels: Kernels) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0]])
    assert kernels.select_positions(scores, first_position=3, num_selected=2).tolist() == [[0, 2]]


def test_zeros_of_either_sign_tie(kernels: Kernels) -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    assert kernels.select_positions(scores, first_position=3, num_selected=2).tolist() == [[0, 1]]


@pytest.mark.parametrize("garbage", [torch.inf, -torch.inf, torch.nan])
def test_positions_that_a_row_does_not_see_are_ignored(kernels: Kernels, garbage: float) -> None:
    scores = random(6, 16, seed=9)
    expected = kernels.select_positions(scores, first_position=10, num_selected=4)
    is_hidden = torch.ones(6, 16, dtype=torch.bool).triu(11)
    scores = scores.masked_fill(is_hidden, garbage)
    assert torch.equal(kernels.select_positions(scores, first_position=10, num_selected=4), expected)


@settings(max_examples=50)
@given(
    num_rows=st.integers(1, 6),
    num_selected=st.integers(1, 8),
    extra=st.integers(0, 10),
    levels=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_selection_equals_sorting_by_score_then_position(
    kernels: Kernels, num_rows: int, num_selected: int, extra: int, levels: int, seed: int
) -> None:
    """Few score levels on both sides of zero, so that most picks are ties."""
    first = num_selected + extra
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, levels - 2, (num_rows, first + num_rows), generator=generator).float()
    expected = [
        sorted(sorted(range(first + r + 1), key=lambda s, r=r: (-scores[r, s].item(), s))[:num_selected])
        for r in range(num_rows)
    ]
    got = kernels.select_positions(scores, first_position=first, num_selected=num_selected)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


@pytest.mark.parametrize("num_levels", [3, 1000, 1 << 24])
@pytest.mark.parametrize(("first_position", "num_selected"), [(2048, 2048), (3000, 2048), (3000, 100)])
def test_selection_of_many_positions_is_that_of_torch(
    kernels: Kernels, first_position: int, num_selected: int, num_levels: int
) -> None:
    """Scores of both signs over 40 orders of magnitude, rounded so that there are few or many ties."""
    scores = random(5, first_position + 5, seed=10)
    scores = (
        (scores * num_levels).round() / num_levels * torch.tensor([[1e-30], [1e-3], [1.0], [1e4], [1e10]])
    )
    scores = scores + 0.0  # no zero is negative
    got, expected = (
        k.select_positions(scores, first_position=first_position, num_selected=num_selected)
        for k in (kernels, TorchKernels())
    )
    assert torch.equal(got, expected)
