"""The plain model against the goldens, and against the fast model on random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import SINGLE_FILE, Checkpoint, expected_tensors
from model.config import ModelConfig
from model.reference import Reference, ReferenceOutput
from tests.reference_data import LOGIT_TOLERANCE, SHAPES, Golden, checkpoint_dir, goldens
from tests.unit.model.harness import SMALL_CONFIG, load_model, random_tensors, run_prompt


def _run(golden: Golden, *, zero_first_embedding: bool = False) -> ReferenceOutput:
    checkpoint = Checkpoint.open(checkpoint_dir(golden.shape))
    shapes = expected_tensors(checkpoint.config)
    tensors = {name: checkpoint.read(name, shape=shape) for name, shape in shapes.items()}
    model = Reference(checkpoint.config, tensors, zero_first_embedding=zero_first_embedding)
    with torch.no_grad():
        return model.forward(golden.prompt)


@pytest.mark.parametrize("golden", goldens(*SHAPES), ids=str)
def test_everything_equals_the_golden(golden: Golden) -> None:
    output = _run(golden)
    assert (output.logits_TV - golden.tensor("logits")).abs().max() <= LOGIT_TOLERANCE * golden.logit_std
    for layer_idx in output.expert_ids:
        if golden.has(f"router_ids.{layer_idx}"):
            assert torch.equal(output.expert_ids[layer_idx], golden.tensor(f"router_ids.{layer_idx}").long())
    for layer_idx in output.indexer_ids:
        if golden.has(f"index.{layer_idx}"):
            assert torch.equal(output.indexer_ids[layer_idx], golden.tensor(f"index.{layer_idx}").long())
    for place, hidden in enumerate(output.hidden):
        if golden.has(f"hidden.{place}"):
            torch.testing.assert_close(hidden, golden.tensor(f"hidden.{place}"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("golden", goldens("mtp"), ids=str)
def test_mtp_logits_equal_the_golden(golden: Golden) -> None:
    deviation = (_run(golden).mtp_logits - golden.tensor("mtp.logits")).abs().max()
    assert deviation <= LOGIT_TOLERANCE * golden.logit_std


@pytest.mark.parametrize("golden", goldens("mtp"), ids=str)
def test_mtp_with_zeroed_first_embedding_equals_its_golden(golden: Golden) -> None:
    got = _run(golden, zero_first_embedding=True).mtp_logits
    expected = golden.tensor("mtp_pos0_zeroed.logits").float()
    # Stored in float16: 11 bits of values up to 10 leave errors up to 4e-3.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_fast_model_equals_the_plain_one_on_random_weights(tmp_path: Path, seed: int) -> None:
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 0.7}
    raw = {**SMALL_CONFIG, "n_shared_experts": 2, "rope_scaling": {**yarn, "mscale_all_dim": 1.0}}
    tensors = random_tensors(ModelConfig.from_hf(raw), seed=seed)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / SINGLE_FILE)
    prompt = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
    plain = Reference(ModelConfig.from_hf(raw), tensors).forward(prompt)
    fast = run_prompt(load_model(tmp_path), prompt)
    spread = plain.logits_TV.std()
    assert (fast.logits - plain.logits_TV).abs().max() <= LOGIT_TOLERANCE * spread
    assert (fast.mtp_logits - plain.mtp_logits).abs().max() <= LOGIT_TOLERANCE * spread


def test_gradients_reach_every_tensor_but_the_discrete_choices() -> None:
    config = ModelConfig.from_hf(SMALL_CONFIG)
    tensors = {name: t.requires_grad_() for name, t in random_tensors(config).items()}
    output = Reference(config, tensors).forward(list(range(40)))
    (output.logits_TV.logsumexp(-1).sum() + output.mtp_logits.logsumexp(-1).sum()).backward()
    without = {name for name, tensor in tensors.items() if tensor.grad is None}
    discrete = {n for n in tensors if ".indexer." in n or n.endswith("e_score_correction_bias")}
    chosen = {
        f"model.layers.{layer_idx}.mlp.experts.{expert_idx}.{matrix}.weight"
        for layer_idx, ids in output.expert_ids.items()
        for expert_idx in ids.unique().tolist()
        for matrix in ("gate_proj", "up_proj", "down_proj")
    }
    assert without == discrete | ({name for name in tensors if ".mlp.experts." in name} - chosen)
    assert all(bool(t.grad.isfinite().all()) for name, t in tensors.items() if name not in without)


def test_index_scores_carry_gradients_for_training_the_indexer() -> None:
    config = ModelConfig.from_hf(SMALL_CONFIG)
    tensors = {name: t.requires_grad_() for name, t in random_tensors(config).items()}
    scores = Reference(config, tensors).forward(list(range(12))).index_scores[1]
    scores[scores.isfinite()].sum().backward()
    assert tensors["model.layers.1.self_attn.indexer.wk.weight"].grad.abs().sum() > 0


def test_gradient_equals_a_finite_difference() -> None:
    config = ModelConfig.from_hf({**SMALL_CONFIG, "num_nextn_predict_layers": 0})
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors = random_tensors(config)
    direction = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        logits = Reference(config, {**tensors, name: weight}).forward([5, 9, 30, 2]).logits_TV
        return logits[-1].double().square().sum()

    weight = tensors[name].clone().requires_grad_()
    loss(weight).backward()
    step = 1e-3
    slope = (loss(tensors[name] + step * direction) - loss(tensors[name] - step * direction)) / (2 * step)
    # A difference of float32 losses over a step of 1e-3 is itself good to about 1e-3.
    assert float(slope) == pytest.approx(float((weight.grad * direction).sum()), rel=1e-2)


def _small() -> Reference:
    config = ModelConfig.from_hf(SMALL_CONFIG)
    return Reference(config, random_tensors(config))


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    model = _small()
    prompts = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(1))
    together = model.forward(prompts)
    alone = [model.forward(prompt) for prompt in prompts]
    torch.testing.assert_close(together.logits_TV, torch.cat([one.logits_TV for one in alone]))
    torch.testing.assert_close(together.mtp_logits, torch.cat([one.mtp_logits for one in alone]))
    for layer_idx, ids in together.indexer_ids.items():
        assert torch.equal(ids, torch.cat([one.indexer_ids[layer_idx] for one in alone]))
    for layer_idx, ids in together.expert_ids.items():
        assert torch.equal(ids, torch.cat([one.expert_ids[layer_idx] for one in alone]))


def test_dense_attention_equals_sparse_where_the_indexer_may_keep_everything() -> None:
    config = ModelConfig.from_hf({**SMALL_CONFIG, "index_topk": 64})
    model = Reference(config, random_tensors(config))
    sparse, dense, watched = (
        model.forward(list(range(20)), attention=kind) for kind in ("sparse", "dense", "dense with indexer")
    )
    torch.testing.assert_close(dense.logits_TV, sparse.logits_TV)
    torch.testing.assert_close(watched.logits_TV, sparse.logits_TV)
    assert dense.index_scores == {}
    assert watched.indexer_ids == {}
    torch.testing.assert_close(watched.index_scores[0], sparse.index_scores[0])


def test_attention_shares_sum_to_one_over_what_is_seen() -> None:
    output = _small().forward(list(range(30)))
    for layer_idx, share_TS in output.attention_shares.items():
        torch.testing.assert_close(share_TS.sum(-1), torch.ones(len(share_TS)))
        num_seen = (share_TS > 0).sum(-1)
        assert torch.equal(num_seen, (output.indexer_ids[layer_idx] >= 0).sum(-1))
