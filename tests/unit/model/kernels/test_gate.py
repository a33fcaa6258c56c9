"""The gate's choice of experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.kernels.base import Kernels
from model.kernels.plain import TorchKernels
from model.matrix import StoredMatrix
from tests.reference_data import unit_parameters, unit_tensors
from tests.unit.model.kernels.cases import assert_near, config, random


def _by_id(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the order of the ids."""
    sorted_ids, order = ids.long().sort(-1)
    return sorted_ids, weights.gather(1, order)


@pytest.mark.parametrize("name", ["real", "negbias", "onegroup", "tightgroups"])
def test_choice_equals_the_golden(kernels: Kernels, name: str) -> None:
    units, model = unit_tensors(), config(**unit_parameters()[f"gate.{name}"])
    gate = kernels.pack(StoredMatrix(values_FD=units[f"gate.{name}.weight"]), "float32")
    ids, weights = kernels.choose_experts(gate(units[f"gate.{name}.x"]), units[f"gate.{name}.bias"], model)
    golden_ids, golden_weights = _by_id(units[f"gate.{name}.ids"], units[f"gate.{name}.weights"])
    got_ids, got_weights = _by_id(ids, weights)
    assert ids.dtype == torch.int32
    assert torch.equal(got_ids, golden_ids)
    assert_near(got_weights, golden_weights)


def _choose_of_scores(
    kernels: Kernels, scores: list[float], bias: list[float], model: ModelConfig
) -> tuple[list[int], list[float]]:
    """The choice of one token for given sigmoid scores."""
    ids, weights = kernels.choose_experts(torch.tensor([scores]).logit(), torch.tensor(bias), model)
    return ids[0].tolist(), weights[0].tolist()


def test_docstring_example(kernels: Kernels) -> None:
    model = config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    ids, weights = _choose_of_scores(kernels, [0.9, 0.1, 0.6, 0.5], [0.0] * 4, model)
    assert (ids, weights) == ([2], [2.5])


def test_negative_biased_scores_never_lose_to_dropped_groups(kernels: Kernels) -> None:
    model = config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    ids, _ = _choose_of_scores(kernels, [0.5, 0.4, 0.1, 0.2], [-3.0, -3.0, -9.0, -9.0], model)
    assert ids == [0, 1]


def test_bias_moves_the_choice_and_not_the_weights(kernels: Kernels) -> None:
    model = config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    ids, weights = _choose_of_scores(kernels, [0.8, 0.6, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0], model)
    assert ids == [2, 0]
    assert weights == pytest.approx([2.5 * 0.2, 2.5 * 0.8])


def test_scores_that_all_underflow_weigh_nothing(kernels: Kernels) -> None:
    model = config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    ids, weights = kernels.choose_experts(
        torch.full((1, 4), -200.0), torch.tensor([0.0, 2.0, 0.0, 1.0]), model
    )
    assert ids.tolist() == [[1, 3]]
    assert weights.abs().max() < 1e-10


@pytest.mark.parametrize("level", [0.0, -3.0, 10.0])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "kept", "top_k"),
    [(256, 8, 4, 8), (64, 1, 1, 6), (24, 4, 2, 3), (10, 5, 3, 6)],
)
def test_choice_is_that_of_torch(
    kernels: Kernels, num_experts: int, num_groups: int, kept: int, top_k: int, level: float
) -> None:
    """Biased scores above, around and below zero."""
    model = config(
        n_routed_experts=num_experts, n_group=num_groups, topk_group=kept, num_experts_per_tok=top_k
    )
    logits, bias = random(60, num_experts, seed=1), random(num_experts, seed=2) * 0.1 + level
    ids, weights = kernels.choose_experts(logits, bias, model)
    expected_ids, expected_weights = TorchKernels().choose_experts(logits, bias, model)
    assert torch.equal(ids, expected_ids)
    assert_near(weights, expected_weights)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    num_groups=st.sampled_from([1, 2, 4]),
    group_size=st.integers(2, 6),
    num_tokens=st.integers(1, 20),
    data=st.data(),
)
def test_choice_stays_in_the_best_groups(
    kernels: Kernels, seed: int, num_groups: int, group_size: int, num_tokens: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, kept * group_size))
    num_experts = num_groups * group_size
    model = config(
        n_routed_experts=num_experts, n_group=num_groups, topk_group=kept, num_experts_per_tok=top_k
    )
    logits, bias = random(num_tokens, num_experts, seed=seed), random(num_experts, seed=seed + 1)
    ids, weights = kernels.choose_experts(logits, bias, model)
    chosen = (logits.sigmoid() + bias).gather(1, ids.long())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert all(len({i // group_size for i in row}) <= kept for row in ids.tolist())
    assert (chosen.diff(dim=1) <= 1e-6).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((num_tokens,), 2.5), rtol=1e-5, atol=0)
