"""A checkpoint laid out like the 671B model's, of tiny matrices: 256 experts a layer over many shards."""

import zlib
from pathlib import Path

import torch
from torch import Tensor

from model.byte_tokenizer import make_tokenizer
from model.checkpoint import Checkpoint
from model.save import CheckpointContents, save_checkpoint
from model.sizes import hf_config
from model.tensor_names import expected_tensors, expert_prefix
from tests.unit.model.harness import SMALL_CONFIG

NUM_EXPERTS = 256
NUM_SHARDS = 60
NUM_DENSE = 3
CONFIG = {
    **SMALL_CONFIG,
    "num_hidden_layers": NUM_DENSE + 2,
    "first_k_dense_replace": NUM_DENSE,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "quantization_config": hf_config("tiny", dtype="fp8")["quantization_config"],
}


def make_wide_checkpoint(out_dir: Path) -> Checkpoint:
    """Three dense layers, two with experts, an MTP layer with experts; FP8 as published."""
    contents = CheckpointContents(hf=CONFIG, value_of=_value_of, tokenizer=make_tokenizer(), dtype="fp8")
    save_checkpoint(out_dir, contents, num_shards=NUM_SHARDS)
    return Checkpoint.open(out_dir)


def files_of(checkpoint: Checkpoint, experts: list[tuple[int, int]]) -> set[Path]:
    """The shards that hold these experts (layer_idx, expert_idx)."""
    prefixes = tuple(expert_prefix(layer_idx, expert_idx) for layer_idx, expert_idx in experts)
    names = [name for name in expected_tensors(checkpoint.config) if name.startswith(prefixes)]
    return {checkpoint.file_of(name) for name in names}


def _value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
