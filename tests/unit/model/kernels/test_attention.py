"""Attention over keys of every head, and over the latent."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from model.batch import LayerCache
from model.kernels.base import AbsorbedHeads, Kernels, Reads
from model.precision import Form
from tests.unit.model.kernels.cases import (
    assert_near,
    cache_of,
    identity_heads,
    layout_of,
    random,
    shuffled,
)

LATENT, WIDTH = 24, 32
"""C, and C + P of `layout_of`."""


def _attend(query_RHX: Tensor, key_RSHX: Tensor, value_RSHO: Tensor, is_read_RS: Tensor) -> Tensor:
    """Softmax attention in float64: (R, H, O)."""
    score_RHS = torch.einsum("rhx,rshx->rhs", query_RHX.double(), key_RSHX.double())
    share_RHS = score_RHS.masked_fill(~is_read_RS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rhs,rsho->rho", share_RHS, value_RSHO.double())


def _causal(num_rows: int, first_position: int) -> Tensor:
    """(R, S) bool: what each row sees."""
    return torch.ones(num_rows, first_position + num_rows, dtype=torch.bool).tril(first_position)


def _dense(num_rows: int, first_position: int, *, begin_row: int = 0, seed: int = 14) -> Reads:
    return Reads(
        begin_row=begin_row,
        end_row=begin_row + num_rows,
        first_position=first_position,
        context_S=shuffled(first_position + num_rows, seed=seed),
    )


@dataclass(frozen=True)
class Widths:
    """Of the expanded form."""

    heads: int = 3
    nope: int = 10
    rope: int = 6
    value: int = 13
    latent: int = 24

    def query(self, num_rows: int, *, seed: int) -> Tensor:
        """(R, H, N + P), scaled."""
        width = self.nope + self.rope
        return random(num_rows, self.heads, width, seed=seed) * width**-0.5

    def expand(self) -> Tensor:
        """(H, N + O, C): keys and values of about 1."""
        weights = random(self.heads, self.nope + self.value, self.latent, seed=1)
        return weights * self.latent**-0.5

    def cache(self, num_cached: int) -> LayerCache:
        return cache_of(num_cached, layout=layout_of(latent=self.latent, rope=self.rope), seed=2)


def _expand(kernels: Kernels, query: Tensor, widths: Widths, reads: Reads) -> Tensor:
    matrix = kernels.pack_heads(widths.expand(), "float32")
    return kernels.attend_expanded(query, matrix, widths.cache(2 * len(reads.context_S)), reads)


def _expanded_expected(query: Tensor, widths: Widths, reads: Reads) -> Tensor:
    num_seen = reads.first_position + reads.num_rows
    rows = widths.cache(2 * len(reads.context_S)).rows_NW[reads.context_S[:num_seen]].double()
    kv = torch.einsum("sc,hvc->shv", rows[:, : widths.latent], widths.expand().double())
    rope = rows[:, None, widths.latent : widths.latent + widths.rope].expand(-1, widths.heads, -1)
    key = torch.cat((kv[..., : widths.nope], rope), dim=-1)
    keys, values = (part.expand(reads.num_rows, -1, -1, -1) for part in (key, kv[..., widths.nope :]))
    return _attend(query, keys, values, _causal(reads.num_rows, reads.first_position))


ROWS = ((1, 0), (1, 130), (2, 0), (49, 0), (64, 64), (20, 611))
"""Rows and their first position: one key; blocks of 48 rows and of 64 and 192 keys, whole and broken."""


@pytest.mark.parametrize(("num_rows", "first_position"), ROWS)
@pytest.mark.parametrize(
    "widths",
    [Widths(), Widths(2, 8, 4, 8, 16), Widths(1, 33, 2, 31, 40), Widths(4, 128, 64, 128, 512)],
    ids=str,
)
def test_expanded_attention_is_causal_softmax(
    kernels: Kernels, widths: Widths, num_rows: int, first_position: int
) -> None:
    query, reads = widths.query(num_rows, seed=3), _dense(num_rows, first_position)
    assert_near(_expand(kernels, query, widths, reads), _expanded_expected(query, widths, reads))


def test_expanded_attention_of_far_apart_scores(kernels: Kernels) -> None:
    """Scores of some hundreds: exp overflows unless the largest is subtracted, and underflows for others."""
    widths, reads = Widths(), _dense(70, 0)
    query = widths.query(70, seed=4) * 100
    # A score of 500 is exact to 3e-5, and so then are the shares.
    assert_near(
        _expand(kernels, query, widths, reads), _expanded_expected(query, widths, reads), tolerance=1e-4
    )


def test_expanded_attention_of_a_bfloat16_expansion_rounds_nothing_else(kernels: Kernels) -> None:
    widths, reads = Widths(), _dense(9, 3)
    query, rounded = widths.query(9, seed=5), widths.expand().bfloat16().float()
    cached = widths.cache(24)
    got, expected = (
        kernels.attend_expanded(query, kernels.pack_heads(weights, form), cached, reads)
        for weights, form in ((widths.expand(), "bfloat16"), (rounded, "float32"))
    )
    assert_near(got, expected)


def test_expanded_attention_reads_no_more_than_the_last_row_sees(kernels: Kernels) -> None:
    """A context may be longer: of a span whose later rows are read otherwise."""
    widths, whole = Widths(), _dense(30, 0)
    reads = replace(whole, begin_row=0, end_row=20)
    query, matrix, cached = (
        widths.query(20, seed=6),
        kernels.pack_heads(widths.expand(), "float32"),
        widths.cache(60),
    )
    expected = kernels.attend_expanded(query, matrix, cached, replace(reads, context_S=whole.context_S[:20]))
    cached.rows_NW[whole.context_S[20:]] = torch.nan
    assert torch.equal(kernels.attend_expanded(query, matrix, cached, reads), expected)


def test_expanded_attention_takes_transposed_queries(kernels: Kernels) -> None:
    widths, reads = Widths(), _dense(40, 0)
    query = widths.query(40, seed=7)
    transposed = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert_near(_expand(kernels, transposed, widths, reads), _expanded_expected(query, widths, reads))


def _cache(num_cached: int) -> LayerCache:
    return cache_of(num_cached, layout=layout_of(latent=LATENT, rope=WIDTH - LATENT), seed=13)


def _selected(num_rows: int, num_selected: int, *, begin_row: int = 0, seed: int = 15) -> Reads:
    """Rows that read so many of their 2000 positions each."""
    generator = torch.Generator().manual_seed(seed)
    context = shuffled(2000 + num_rows, seed=seed)
    position_RU = (
        torch.rand(num_rows, 2000, generator=generator).argsort(-1)[:, :num_selected].sort(-1).values
    )
    return Reads(
        begin_row=begin_row,
        end_row=begin_row + num_rows,
        first_position=2000,
        context_S=context,
        selected_RU=context[position_RU],
    )


def _absorbed_expected(query: Tensor, cached: LayerCache, read: Reads) -> Tensor:
    """The rows of one read."""
    if read.selected_RU is None:
        ids_RS = read.context_S.expand(read.num_rows, -1)
        is_read_RS = _causal(read.num_rows, read.first_position)
    else:
        ids_RS, is_read_RS = read.selected_RU, torch.ones_like(read.selected_RU, dtype=torch.bool)
    key_RSHX = cached.rows_NW[ids_RS][:, :, None, :WIDTH].expand(-1, -1, query.shape[1], -1)
    return _attend(query, key_RSHX, key_RSHX[..., :LATENT], is_read_RS)


def _attend_absorbed(kernels: Kernels, query: Tensor, cached: LayerCache, reads: list[Reads]) -> Tensor:
    """Of queries that are at the latent already; the latent itself."""
    heads = identity_heads(kernels, query.shape[1], latent=cached.layout.latent)
    return kernels.attend_absorbed(query, heads, cached, reads)


def _check_absorbed(kernels: Kernels, query: Tensor, reads: list[Reads]) -> None:
    cached = _cache(4200)
    got = _attend_absorbed(kernels, query, cached, reads)
    parts = query.split([read.num_rows for read in reads])
    expected = [_absorbed_expected(part, cached, read) for part, read in zip(parts, reads, strict=True)]
    assert_near(got, torch.cat(expected))


@pytest.mark.parametrize("num_heads", [1, 5, 16])
@pytest.mark.parametrize(("num_rows", "first_position"), [*ROWS, (1, 511), (1, 512), (3, 1500)])
def test_absorbed_attention_over_a_context(
    kernels: Kernels, num_rows: int, first_position: int, num_heads: int
) -> None:
    """Contexts around 64 and 512 keys, where softmax steps and partitions end."""
    query = random(num_rows, num_heads, WIDTH, seed=16) * WIDTH**-0.5
    _check_absorbed(kernels, query, [_dense(num_rows, first_position)])


@pytest.mark.parametrize("num_selected", [1, 12, 64, 700])
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_absorbed_attention_over_a_selection(kernels: Kernels, num_rows: int, num_selected: int) -> None:
    query = random(num_rows, 5, WIDTH, seed=17) * WIDTH**-0.5
    _check_absorbed(kernels, query, [_selected(num_rows, num_selected)])


def test_absorbed_attention_of_several_sequences(kernels: Kernels) -> None:
    """Reads of both kinds; their rows need not lie together in the batch."""
    reads = [
        _dense(1, 40, begin_row=2, seed=18),
        _selected(2, 64, begin_row=7, seed=19),
        _dense(5, 0, begin_row=9, seed=20),
        _selected(1, 700, begin_row=30, seed=21),
    ]
    _check_absorbed(kernels, random(9, 5, WIDTH, seed=22) * WIDTH**-0.5, reads)


def test_absorbed_attention_of_far_apart_scores(kernels: Kernels) -> None:
    query, cached, read = random(3, 5, WIDTH, seed=23) * 20, _cache(2000), _dense(3, 700)
    got = _attend_absorbed(kernels, query, cached, [read])
    # As above: scores of some hundreds.
    assert_near(got, _absorbed_expected(query, cached, read), tolerance=1e-4)


@pytest.mark.parametrize("latent", [20, 33, 512])
def test_absorbed_attention_of_any_latent_width(kernels: Kernels, latent: int) -> None:
    cached = cache_of(200, layout=layout_of(latent=latent, rope=8), seed=24)
    query, read = random(4, 3, latent + 8, seed=25) * latent**-0.5, _dense(4, 80)
    key = cached.rows_NW[read.context_S][None, :, None, : latent + 8].expand(4, -1, 3, -1)
    expected = _attend(query, key, key[..., :latent], _causal(4, 80))
    assert_near(_attend_absorbed(kernels, query, cached, [read]), expected)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_absorbed_attention_between_its_products(kernels: Kernels, num_rows: int, form: Form) -> None:
    """Queries to the latent before it, the latent to values behind it."""
    heads = AbsorbedHeads(
        key_HCN=kernels.pack_heads(random(5, LATENT, 10, seed=40) * 10**-0.5, form),
        value_HOC=kernels.pack_heads(random(5, 13, LATENT, seed=41) * LATENT**-0.5, form),
    )
    query, cached, read = (
        random(num_rows, 5, 10 + WIDTH - LATENT, seed=42),
        _cache(700),
        _dense(num_rows, 300),
    )
    at_latent = torch.cat((heads.key_HCN(query[..., :10].contiguous()), query[..., 10:]), dim=-1)
    expected = heads.value_HOC(_attend_absorbed(kernels, at_latent, cached, [read]))
    assert torch.equal(kernels.attend_absorbed(query, heads, cached, [read]), expected)


def test_absorbed_attention_takes_transposed_queries(kernels: Kernels) -> None:
    query = random(4, 20, WIDTH, seed=26).transpose(0, 1) * WIDTH**-0.5
    _check_absorbed(kernels, query, [_dense(20, 30)])
