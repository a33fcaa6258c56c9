import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.indexer import index_scores, indexer_keys, indexer_queries, select_positions
from model.rope import RopeTable
from model.weights import IndexerWeights
from tests.reference_data import unit_parameters, unit_tensors
from tests.unit.model.harness import SMALL_CONFIG


def _golden_scores() -> torch.Tensor:
    units, given_values = unit_tensors(), unit_parameters()["indexer"]
    config = ModelConfig.from_hf(
        SMALL_CONFIG
        | {"qk_rope_head_dim": given_values["qk_rope_head_dim"]}
        | {key: given_values[key] for key in ("index_n_heads", "index_head_dim", "index_topk")}
    )
    weights = IndexerWeights(
        query_JIQ=units["indexer.wq_b"],
        key_ID=units["indexer.wk"],
        key_norm_I=units["indexer.k_norm.weight"],
        key_bias_I=units["indexer.k_norm.bias"],
        head_JD=units["indexer.weights_proj"],
    )
    table = RopeTable(cos_TP=units["indexer.cos"], sin_TP=units["indexer.sin"])
    x, q = units["indexer.x"][0], units["indexer.qr"][0]
    return index_scores(indexer_queries(x, q, weights, table, config), indexer_keys(x, weights, table))


def test_scores_equal_the_golden() -> None:
    visible = torch.ones(48, 48, dtype=torch.bool).tril()
    golden = unit_tensors()["indexer.exact.scores"]
    torch.testing.assert_close(_golden_scores()[visible], golden[visible], rtol=1e-5, atol=1e-5)


def test_selected_positions_equal_the_golden() -> None:
    golden = unit_tensors()["indexer.exact.topk"][10:].long().sort(-1).values
    got = select_positions(_golden_scores()[10:], first_position=10, num_selected=10)
    assert torch.equal(got, golden)


def test_docstring_example() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0]])
    assert select_positions(scores, first_position=3, num_selected=2).tolist() == [[0, 2]]


@settings(max_examples=80)
@given(
    num_rows=st.integers(1, 6),
    num_selected=st.integers(1, 8),
    extra=st.integers(0, 10),
    levels=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_selection_equals_sorting_by_score_then_position(
    num_rows: int, num_selected: int, extra: int, levels: int, seed: int
) -> None:
    """Few score levels, so that most picks are ties."""
    first = num_selected + extra
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (num_rows, first + num_rows), generator=generator).float()
    expected = [
        sorted(sorted(range(first + r + 1), key=lambda s, r=r: (-scores[r, s].item(), s))[:num_selected])
        for r in range(num_rows)
    ]
    got = select_positions(scores, first_position=first, num_selected=num_selected)
    assert got.tolist() == expected


@pytest.mark.parametrize("num_rows", [1, 2, 5, 17])
def test_bits_of_scores_do_not_depend_on_other_rows(num_rows: int) -> None:
    config = ModelConfig.from_hf({**SMALL_CONFIG, "index_n_heads": 6, "index_head_dim": 32})
    generator = torch.Generator().manual_seed(1)
    weights = IndexerWeights(
        query_JIQ=torch.randn(192, 16, generator=generator),
        key_ID=torch.randn(32, 32, generator=generator),
        key_norm_I=torch.ones(32),
        key_bias_I=torch.zeros(32),
        head_JD=torch.randn(6, 32, generator=generator),
    )
    table = RopeTable(cos_TP=torch.full((40, 2), math.cos(1)), sin_TP=torch.full((40, 2), math.sin(1)))
    x, q = torch.randn(40, 32, generator=generator), torch.randn(40, 16, generator=generator)
    queries = indexer_queries(x, q, weights, table, config)
    keys = indexer_keys(x, weights, table)
    alone = index_scores(queries.rows(0, num_rows), keys[:33])
    assert torch.equal(alone, index_scores(queries, keys)[:num_rows, :33])
