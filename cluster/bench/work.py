"""How many operations and bytes a step of the model takes at least: what measurements are held against.

Counted is what the model's definition asks for: every matrix product and attention's two, each weight read
once a step, and the cached rows that attention reads. Norms, rotations and softmax are left out. A step
takes at least as long as its arithmetic at the rates of matrix products, or as its bytes at the rate of
memory, whichever is more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.limits import MachineLimits
from model.config import ModelConfig
from model.precision import Form
from model.tensor_names import expected_tensors

FORM_BYTES: dict[Form, float] = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
"""Bytes of a weight."""
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One step, or several in a row."""

    float32_flops: float
    int8_ops: float
    num_bytes: float

    def bound_s(self, limits: MachineLimits) -> float:
        """Seconds that it takes at least."""
        arithmetic_s = self.float32_flops / limits.float32_flops_per_s + self.int8_ops / limits.int8_ops_per_s
        return max(arithmetic_s, self.num_bytes / limits.memory_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Forms:
    """How a model's weights are held."""

    experts: Form
    head: Form
    others: Form


def count_step(
    config: ModelConfig, forms: Forms, *, positions: Sequence[int], num_scored: int, is_prompt: bool
) -> StepWork:
    """The work of one step.

    Args:
        config: the architecture.
        forms: how its weights are held.
        positions: of each row in its sequence.
        num_scored: rows whose logits are wanted.
        is_prompt: whether attention may expand keys and values, which takes fewer operations.
    """
    num_rows = len(positions)
    dense = _dense_weights(config)
    expert_weights = 3 * config.hidden_size * config.moe_intermediate_size
    num_layers, num_moe = config.num_hidden_layers, len(config.moe_layer_ids)
    routed = num_rows * config.num_experts_per_tok * num_moe * expert_weights
    head = config.vocab_size * config.hidden_size
    sparse_rows = [p for p in positions if p >= config.index_topk]
    multiplied = num_rows * dense + num_layers * _attention_products(config, positions, is_prompt=is_prompt)
    indexer = config.index_n_heads * (config.index_head_dim * config.q_lora_rank + config.hidden_size)
    indexer_keys = config.index_n_heads * config.index_head_dim
    multiplied += num_layers * sum(indexer + (p + 1) * indexer_keys for p in sparse_rows)
    touched = _distinct_experts(config, num_rows) * num_moe * expert_weights
    cached = num_layers * sum(
        _cached_floats(config, p) for p in ({max(positions)} if is_prompt else positions)
    )
    in_int8 = 0.0
    for form, products in ((forms.experts, routed), (forms.head, num_scored * head)):
        if form == "int8":
            in_int8 += products
        else:
            multiplied += products
    return StepWork(
        float32_flops=2.0 * multiplied,
        int8_ops=2.0 * in_int8,
        num_bytes=(dense + num_layers * indexer * bool(sparse_rows)) * FORM_BYTES[forms.others]
        + head * FORM_BYTES[forms.head]
        + touched * FORM_BYTES[forms.experts]
        + cached * _FLOAT_BYTES,
    )


def _dense_weights(config: ModelConfig) -> int:
    """Weights of the main layers that every row meets: no routed experts, no indexer but its keys."""
    skipped = (".mlp.experts.", "embed_tokens", "lm_head", "indexer.wq_b", "indexer.weights_proj")
    main = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers))
    return sum(
        shape[0] * shape[1]
        for name, shape in expected_tensors(config).items()
        if name.startswith(main) and len(shape) == 2 and not any(part in name for part in skipped)
    )


def _attention_products(config: ModelConfig, positions: Sequence[int], *, is_prompt: bool) -> float:
    """Multiplications of one layer between queries, keys and values."""
    absorbed = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    expanded = config.qk_head_dim + config.v_head_dim
    return config.num_attention_heads * sum(
        min(p + 1, config.index_topk) * (expanded if is_prompt and p < config.index_topk else absorbed)
        for p in positions
    )


def _cached_floats(config: ModelConfig, position: int) -> int:
    """Cached values that a row at a position reads in one layer."""
    read = min(position + 1, config.index_topk) * (config.kv_lora_rank + config.qk_rope_head_dim)
    return read + (position + 1) * config.index_head_dim if position >= config.index_topk else read


def _distinct_experts(config: ModelConfig, num_rows: int) -> float:
    """Experts of a layer that some rows need, where every choice is as likely as any other.

    Example: 64 experts, 8 a row: 8 for one row, 42 for eight, 63.1 for 32.
    """
    share = config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - (1 - share) ** num_rows)
