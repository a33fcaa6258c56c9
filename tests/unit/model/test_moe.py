import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.moe import select_experts
from tests.reference_data import unit_parameters, unit_tensors
from tests.unit.model.harness import SMALL_CONFIG


def _config(**changes: object) -> ModelConfig:
    return ModelConfig.from_hf({**SMALL_CONFIG, **changes})


@pytest.mark.parametrize("name", ["real", "negbias", "onegroup", "tightgroups"])
def test_gate_equals_the_golden(name: str) -> None:
    units, config = unit_tensors(), _config(**unit_parameters()[f"gate.{name}"])
    ids, weights = select_experts(
        units[f"gate.{name}.x"], units[f"gate.{name}.weight"], units[f"gate.{name}.bias"], config
    )
    golden_ids, golden_order = units[f"gate.{name}.ids"].long().sort(-1)
    got_ids, got_order = ids.long().sort(-1)
    assert ids.dtype == torch.int32
    assert torch.equal(got_ids, golden_ids)
    golden_weights = units[f"gate.{name}.weights"].gather(1, golden_order)
    torch.testing.assert_close(weights.gather(1, got_order), golden_weights, rtol=1e-5, atol=1e-6)


def _select_from_scores(scores: list[float], bias: list[float], config: ModelConfig) -> tuple[list, list]:
    """The choice for given sigmoid scores: one token, the gate's row e gives logit(score e)."""
    logits = torch.tensor(scores).logit()
    gate = torch.stack((logits, torch.zeros_like(logits)), dim=1)
    ids, weights = select_experts(torch.tensor([[1.0, 0.0]]), gate, torch.tensor(bias), config)
    return ids[0].tolist(), weights[0].tolist()


def test_docstring_example() -> None:
    config = _config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    ids, weights = _select_from_scores([0.9, 0.1, 0.6, 0.5], [0.0] * 4, config)
    assert (ids, weights) == ([2], [2.5])


def test_negative_biased_scores_never_lose_to_dropped_groups() -> None:
    config = _config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    ids, _ = _select_from_scores([0.5, 0.4, 0.1, 0.2], [-3.0, -3.0, -9.0, -9.0], config)
    assert ids == [0, 1]


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    config = _config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    ids, weights = _select_from_scores([0.8, 0.6, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0], config)
    assert ids == [2, 0]
    assert weights == pytest.approx([2.5 * 0.2, 2.5 * 0.8])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_groups=st.sampled_from([1, 2, 4]),
    group_size=st.integers(2, 6),
    num_tokens=st.integers(1, 20),
    data=st.data(),
)
def test_choice_stays_in_the_best_groups(
    seed: int, num_groups: int, group_size: int, num_tokens: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, kept * group_size))
    config = _config(
        n_routed_experts=num_groups * group_size,
        n_group=num_groups,
        topk_group=kept,
        num_experts_per_tok=top_k,
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 8, generator=generator)
    gate = torch.randn(num_groups * group_size, 8, generator=generator)
    bias = torch.randn(num_groups * group_size, generator=generator)
    ids, weights = select_experts(x, gate, bias, config)
    biased = (x @ gate.T).sigmoid() + bias
    chosen = biased.gather(1, ids.long())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert all(len({i // group_size for i in row}) <= kept for row in ids.tolist())
    assert (chosen.diff(dim=1) <= 1e-6).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((num_tokens,), 2.5), rtol=1e-5, atol=0)
