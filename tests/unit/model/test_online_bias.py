"""Online selection bias: it moves choices toward idle experts, within its bounds, and ends itself."""

import pytest
import torch
from torch import Tensor

import model.online_bias
from model.config import ModelConfig
from model.online_bias import OnlineBias, OnlineBiasRules
from tests.unit.model.harness import SMALL_CONFIG, reference_model, run_prompt
from tests.unit.model.implementations import named_kernels

CONFIG = ModelConfig.from_hf(SMALL_CONFIG)
E, K = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
KERNELS = named_kernels("torch")
LAYER = 1


def rules(*, step: float = 0.001, limit: float = 0.02, most_changed_share: float = 1.0) -> OnlineBiasRules:
    return OnlineBiasRules(step=step, limit=limit, most_changed_share=most_changed_share)


def skewed(num_rows: int, seed: int = 0) -> Tensor:
    """Logits under which low experts are chosen more often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, E, generator=generator) * 0.2 - torch.arange(E) * 0.05


def choose(bias: OnlineBias, logits_TE: Tensor, layer_idx: int = LAYER) -> tuple[Tensor, Tensor]:
    return bias.choose(KERNELS, logits_TE, torch.zeros(E), CONFIG, layer_idx=layer_idx)


def imbalance(ids_TK: Tensor) -> float:
    counts = torch.bincount(ids_TK.reshape(-1).long(), minlength=E).double()
    return float(counts.max() / counts.mean())


def test_offsets_move_by_one_step_toward_mean_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the docstring, through the window's counts."""
    monkeypatch.setattr(model.online_bias, "WINDOW_CHOICES", 16)
    bias = OnlineBias(rules())
    plain = KERNELS.choose_experts(skewed(16 // K), torch.zeros(E), CONFIG)[0]
    choose(bias, skewed(16 // K))
    counts = torch.bincount(plain.reshape(-1).long(), minlength=E)
    offset_E = bias.offset(LAYER)
    assert offset_E is not None
    assert torch.equal(offset_E, 0.001 * torch.sign(16 / E - counts))


def test_load_evens_out_and_weights_stay_those_of_the_scores() -> None:
    bias = OnlineBias(rules(step=0.01, limit=0.3))
    before = imbalance(choose(bias, skewed(2048))[0])
    for turn in range(60):
        ids_TK, weights_TK = choose(bias, skewed(2048, seed=turn))
    assert imbalance(ids_TK) < 0.6 * before
    score_TK = skewed(2048, seed=59).sigmoid().gather(1, ids_TK.long())
    expected_TK = score_TK / score_TK.sum(-1, keepdim=True) * CONFIG.routed_scaling_factor
    torch.testing.assert_close(weights_TK, expected_TK)


def test_offsets_stay_within_their_range() -> None:
    bias = OnlineBias(rules(step=0.01, limit=0.025))
    for turn in range(20):
        choose(bias, skewed(2048, seed=turn))
    offset_E = bias.offset(LAYER)
    assert offset_E is not None
    assert float(offset_E.abs().max()) == pytest.approx(0.025)


def test_changed_choices_are_counted() -> None:
    bias = OnlineBias(rules(step=0.01, limit=0.3))
    expected = 0
    for turn in range(5):
        ids_TK, _ = choose(bias, skewed(2048, seed=turn))
        plain_TK, _ = KERNELS.choose_experts(skewed(2048, seed=turn), torch.zeros(E), CONFIG)
        rows = zip(ids_TK.tolist(), plain_TK.tolist(), strict=True)
        expected += sum(len(set(ids) - set(plain)) for ids, plain in rows)
    assert bias.num_choices == 5 * 2048 * K
    assert bias.num_changed == expected > 0


def test_it_ends_itself_beyond_its_bound() -> None:
    bias = OnlineBias(rules(step=0.05, limit=0.5, most_changed_share=0.01))
    for turn in range(10):
        choose(bias, skewed(2048, seed=turn))
    assert not bias.is_on
    plain_TK, plain_weights_TK = KERNELS.choose_experts(skewed(64), torch.zeros(E), CONFIG)
    ids_TK, weights_TK = choose(bias, skewed(64))
    assert torch.equal(ids_TK, plain_TK)
    assert torch.equal(weights_TK, plain_weights_TK)


def test_layers_learn_apart() -> None:
    bias = OnlineBias(rules())
    choose(bias, skewed(2048))
    assert bias.offset(LAYER + 1) is None


def test_model_asks_it_for_every_moe_layer_and_none_by_default() -> None:
    reference = reference_model("default", kernels=named_kernels("best"))
    plain = run_prompt(reference, [5, 6, 7, 8], chunk=4)
    assert reference.transformer.online_bias is None
    bias = OnlineBias(rules())
    reference.transformer.online_bias = bias
    try:
        found = run_prompt(reference, [5, 6, 7, 8], chunk=4)
    finally:
        reference.transformer.online_bias = None
    assert all(bias.offset(layer_idx) is not None for layer_idx in reference.config.moe_layer_ids)
    assert torch.equal(found.logits, plain.logits), "no window is full yet: nothing has moved"
