"""What is in a checkpoint, in numbers: from config and headers alone, no weight is read."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from model.checkpoint import CHANNEL_SUFFIX, SCALE_SUFFIX, Checkpoint
from model.compact_rows import CompactForm, RowCodec
from model.config import ModelConfig
from model.tensor_names import expected_tensors, mlp_tensors

FLOAT32_BYTES = 4
"""Workers of this build hold weights and cache rows in float32."""
DTYPE_BYTES: Mapping[str, int] = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1}
"""Bytes of one value, by safetensors' name of the type."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """The figures that decide how many workers of what memory a checkpoint needs."""

    fingerprint: str
    num_parameters: int
    """Weights, scales not counted."""
    num_routed_parameters: int
    """Weights in routed experts."""
    num_active_parameters: int
    """Weights that one token uses: all but other experts, the embedding table and MTP."""
    dtype_bytes: Mapping[str, int]
    """Stored bytes by type, scales included."""
    num_files: int
    num_layers: int
    """Main layers."""
    num_moe_layers: int
    """Main layers with experts."""
    num_mtp_layers: int
    num_experts: int
    """Routed experts per layer."""
    num_experts_per_token: int
    num_shared_experts: int
    context_tokens: int
    """Longest sequence."""
    attention_worker_bytes: int
    """Weights of one attention worker in memory: everything but the routed experts."""
    expert_bytes: int
    """One routed expert in an expert worker's memory."""
    all_experts_bytes: int
    """Every routed expert of every layer once: divide by expert workers, multiply by replicas."""
    kv_bytes_per_token: int
    """Cache rows of one token over all layers, the indexer's keys among them, in FP32."""
    kv_bytes_by_form: dict[str, int]
    """The same in each form of `kv.dtype`."""


def summarise(checkpoint: Checkpoint) -> CheckpointSummary:
    """The figures of a checkpoint that `Checkpoint.check` accepts."""
    config = checkpoint.config
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    expert = sum(map(math.prod, mlp_tensors("", config.hidden_size, config.moe_intermediate_size).values()))
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    mtp_rest = sum(n for name, n in sizes.items() if name.startswith(mtp_prefix) and ".experts." not in name)
    always = total - routed - mtp_rest - sizes["model.embed_tokens.weight"]
    return CheckpointSummary(
        fingerprint=checkpoint.fingerprint(),
        num_parameters=total,
        num_routed_parameters=routed,
        num_active_parameters=always + len(config.moe_layer_ids) * config.num_experts_per_tok * expert,
        dtype_bytes=_dtype_bytes(checkpoint),
        num_files=len({checkpoint.file_of(name) for name in sizes}),
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(config.moe_layer_ids),
        num_mtp_layers=config.num_nextn_predict_layers,
        num_experts=config.n_routed_experts,
        num_experts_per_token=config.num_experts_per_tok,
        num_shared_experts=config.n_shared_experts,
        context_tokens=config.max_position_embeddings,
        attention_worker_bytes=(total - routed) * FLOAT32_BYTES,
        expert_bytes=expert * FLOAT32_BYTES,
        all_experts_bytes=routed * FLOAT32_BYTES,
        kv_bytes_per_token=config.cache_layout().width * config.num_cache_layers * FLOAT32_BYTES,
        kv_bytes_by_form=_kv_bytes_by_form(config),
    )


def _kv_bytes_by_form(config: ModelConfig) -> dict[str, int]:
    layout, num_layers = config.cache_layout(), config.num_cache_layers
    forms: tuple[CompactForm, ...] = ("bfloat16", "fp8")
    row_bytes = {"float32": layout.width * FLOAT32_BYTES}
    row_bytes.update((form, RowCodec(layout, form).row_bytes) for form in forms)
    return {form: num_bytes * num_layers for form, num_bytes in row_bytes.items()}


def _dtype_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes by type of the tensors that the config asks for and of their scales."""
    counted: Counter[str] = Counter()
    known = set(checkpoint.names())
    for name in expected_tensors(checkpoint.config):
        for stored in (name, name + SCALE_SUFFIX, name + CHANNEL_SUFFIX):
            if stored in known:
                dtype = checkpoint.dtype(stored)
                counted[dtype] += math.prod(checkpoint.shape(stored)) * DTYPE_BYTES[dtype]
    return dict(sorted(counted.items()))
