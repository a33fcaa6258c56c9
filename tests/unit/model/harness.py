"""Runs a model over prompts the way an engine would: in chunks, step by step, several at once."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batch import DenseCache, make_batch
from model.cache_layout import KeyForm
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels.base import Kernels
from model.kernels.choose import choose_kernels
from model.local_experts import LocalExperts
from model.precision import Precision
from model.tensor_names import expected_tensors
from model.transformer import Transformer
from model.weights import Packing, load_model_weights
from tests.reference_data import checkpoint_dir

SMALL_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 5,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""A config.json smaller than any reference checkpoint."""


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Float32 tensors of a config, by HF name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in expected_tensors(config).items()
    }


@dataclass(frozen=True)
class Model:
    """A checkpoint with everything that computes it in one process."""

    config: ModelConfig
    transformer: Transformer
    experts: LocalExperts

    def cache(self, key_form: KeyForm = "float32") -> DenseCache:
        return DenseCache(num_layers=self.config.num_cache_layers, layout=self.config.cache_layout(key_form))


@functools.cache
def load_model(
    directory: Path,
    *,
    zero_first_embedding: bool = False,
    kernels: Kernels | None = None,
    precision: Precision = "float32",
) -> Model:
    """The model of a checkpoint directory; kept, since nothing in it changes."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(directory)
    packing = Packing(kernels=kernels or choose_kernels(num_threads=1), precision=precision)
    transformer = Transformer(
        checkpoint.config,
        load_model_weights(checkpoint, packing),
        packing.kernels,
        zero_first_embedding=zero_first_embedding,
    )
    return Model(checkpoint.config, transformer, LocalExperts.load(checkpoint, packing))


def reference_model(shape: str, **options: Any) -> Model:
    return load_model(checkpoint_dir(shape), **options)


@dataclass
class Recorder:
    """A `Trace` that keeps everything, by layer, in the order of the calls."""

    expert_ids: dict[int, list[Tensor]] = field(default_factory=dict)
    expert_weights: dict[int, list[Tensor]] = field(default_factory=dict)
    indexer_ids: dict[int, list[Tensor]] = field(default_factory=dict)

    def on_gate(self, layer_idx: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        order = ids_TK.argsort(-1)
        self.expert_ids.setdefault(layer_idx, []).append(ids_TK.gather(1, order))
        self.expert_weights.setdefault(layer_idx, []).append(weights_TK.gather(1, order))

    def on_index(self, layer_idx: int, span_idx: int, ids_RU: Tensor) -> None:
        self.indexer_ids.setdefault(layer_idx, []).append(ids_RU)


@dataclass(frozen=True)
class Run:
    """What a prompt gave."""

    logits: Tensor
    """(T, V)."""
    mtp_logits: Tensor | None
    """(T - 1, V), of models with an MTP layer and prompts of two tokens and more."""
    trace: Recorder


def run_prompt(
    model: Model,
    prompt: Sequence[int],
    *,
    chunk: int = 1 << 30,
    prompt_tokens: int | None = None,
    key_form: KeyForm = "float32",
) -> Run:
    """A prompt in chunks of so many tokens; 1 is what decoding does.

    Tokens from prompt_tokens on count as generated, None = all are prompt.
    """
    cache, trace = model.cache(key_form), Recorder()
    prompts = None if prompt_tokens is None else [prompt_tokens]
    logits, drafts = [], []
    for begin in range(0, len(prompt), chunk):
        part = prompt[begin : begin + chunk]
        batch = make_batch([part], first_positions=[begin], prompt_tokens=prompts)
        hidden = model.transformer.forward(batch, cache.view(batch), model.experts, trace)
        logits.append(model.transformer.logits(hidden))
        next_ids = prompt[begin + 1 : begin + 1 + chunk]
        if model.config.num_nextn_predict_layers and next_ids:
            drafts.append(_draft(model, cache, hidden[: len(next_ids)], next_ids, begin))
    return Run(torch.cat(logits), torch.cat(drafts) if drafts else None, trace)


def _draft(
    model: Model, cache: DenseCache, hidden: Tensor, next_ids: Sequence[int], first_position: int
) -> Tensor:
    batch = make_batch([next_ids], first_positions=[first_position])
    return model.transformer.mtp_logits(batch, hidden, cache.view(batch), model.experts)


def run_together(model: Model, prompts: Sequence[Sequence[int]], *, chunks: Sequence[int]) -> list[Tensor]:
    """Logits (T, V) of several prompts, each in its own chunk size, in the same batches while they last."""
    cache = model.cache()
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while any(n < len(prompt) for n, prompt in zip(done, prompts, strict=True)):
        active = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]
        parts = [prompts[i][done[i] : done[i] + chunks[i]] for i in active]
        batch = make_batch(parts, first_positions=[done[i] for i in active])
        hidden = model.transformer.forward(batch, cache.view(batch, active), model.experts)
        for i, span in zip(active, batch.spans, strict=True):
            logits[i].append(model.transformer.logits(hidden[span.begin_row : span.end_row]))
            done[i] = span.context_tokens
    return [torch.cat(parts) for parts in logits]


def greedy(model: Model, prompt: Sequence[int], *, num_tokens: int) -> list[int]:
    """The greedy continuation, one token a step, end of sequence ignored."""
    cache, ids, pending = model.cache(), list(prompt), list(prompt)
    while len(ids) < len(prompt) + num_tokens:
        batch = make_batch([pending], first_positions=[len(ids) - len(pending)], prompt_tokens=[len(prompt)])
        hidden = model.transformer.forward(batch, cache.view(batch), model.experts)
        pending = [int(model.transformer.logits(hidden[-1:]).argmax())]
        ids += pending
    return ids[len(prompt) :]
