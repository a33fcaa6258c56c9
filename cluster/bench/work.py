"""How many operations and bytes a step of the model takes at least: what measurements are held against.

Counted is what the model's definition asks for: every matrix product and attention's two, each weight read
once a step, and the cached rows that attention reads. Norms, rotations and softmax are left out. A phase
takes at least as long as its arithmetic at the rates of matrix products, or as its bytes at the rate of
memory, whichever is more. Each phase of a layer needs what the one before it computed, and what it reads
fits in no cache, so the phases' times add up. If everything could overlap everything, a step would be bound
by the sums instead: that looser bound is given beside it.
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
class Work:
    """Operations and bytes of one phase, over all layers."""

    float32_flops: float = 0.0
    int8_ops: float = 0.0
    num_bytes: float

    def arithmetic_s(self, limits: MachineLimits) -> float:
        """Seconds of the matrix products at the machine's rates."""
        return self.float32_flops / limits.float32_flops_per_s + self.int8_ops / limits.int8_ops_per_s

    def bound_s(self, limits: MachineLimits) -> float:
        """Seconds that it takes at least."""
        return max(self.arithmetic_s(limits), self.num_bytes / limits.memory_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One step, phase by phase."""

    matrices: Work
    """Every matrix but the routed experts and the head; the indexer's too."""
    attention: Work
    """Products of queries, keys and values, the indexer's too."""
    experts: Work
    """The routed ones."""
    head: Work

    @property
    def phases(self) -> tuple[Work, ...]:
        """In any order: none of them overlaps another."""
        return self.matrices, self.attention, self.experts, self.head

    @property
    def total(self) -> Work:
        """All phases as one."""
        return Work(
            float32_flops=sum(phase.float32_flops for phase in self.phases),
            int8_ops=sum(phase.int8_ops for phase in self.phases),
            num_bytes=sum(phase.num_bytes for phase in self.phases),
        )

    def bound_s(self, limits: MachineLimits) -> float:
        """Seconds that it takes at least, its phases one after another."""
        return sum(phase.bound_s(limits) for phase in self.phases)

    def overlapped_bound_s(self, limits: MachineLimits) -> float:
        """Seconds that it would take at least if its phases did not need each other."""
        return self.total.bound_s(limits)


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
    head = config.vocab_size * config.hidden_size
    sparse_rows = [p for p in positions if p >= config.index_topk]
    indexer = config.index_n_heads * (config.index_head_dim * config.q_lora_rank + config.hidden_size)
    indexer_keys = config.index_n_heads * config.index_head_dim
    products = _attention_products(config, positions, is_prompt=is_prompt)
    products += sum((p + 1) * indexer_keys for p in sparse_rows)
    cached = sum(_cached_floats(config, p) for p in ({max(positions)} if is_prompt else positions))
    return StepWork(
        matrices=Work(
            float32_flops=2.0 * (num_rows * dense + num_layers * len(sparse_rows) * indexer),
            num_bytes=(dense + num_layers * indexer * bool(sparse_rows)) * FORM_BYTES[forms.others],
        ),
        attention=Work(
            float32_flops=2.0 * num_layers * products, num_bytes=float(num_layers * cached * _FLOAT_BYTES)
        ),
        experts=_form_work(
            forms.experts,
            products=num_rows * config.num_experts_per_tok * num_moe * expert_weights,
            num_weights=_distinct_experts(config, num_rows) * num_moe * expert_weights,
        ),
        head=_form_work(forms.head, products=num_scored * head, num_weights=head),
    )


def _form_work(form: Form, *, products: float, num_weights: float) -> Work:
    """Products with weights that may be INT8."""
    is_int8 = form == "int8"
    return Work(
        float32_flops=0.0 if is_int8 else 2.0 * products,
        int8_ops=2.0 * products if is_int8 else 0.0,
        num_bytes=num_weights * FORM_BYTES[form],
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
