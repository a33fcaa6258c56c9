"""The trained tensors: their first values, and which optimiser moves which."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.tensor_names import expected_tensors

_BIAS = "e_score_correction_bias"


def initial_weights(config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """Name -> float32 tensor; the MTP layer's embedding and head are the main ones themselves.

    Matrices start at half the size that keeps activations at unit size, those that write to the residual
    stream smaller by its depth, the head near zero: the first loss is ln(vocabulary).
    """
    generator = torch.Generator().manual_seed(seed)
    mtp = f"model.layers.{config.num_hidden_layers}"
    shared = {
        f"{mtp}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{mtp}.shared_head.head.weight": "lm_head.weight",
    }
    weights: dict[str, Tensor] = {}
    for name, shape in expected_tensors(config).items():
        if name not in shared:
            weights[name] = _initial(name, shape, config, generator)
            weights[name].requires_grad_(not name.endswith(_BIAS))
    return weights | {
        name: weights[owner] for name, owner in shared.items() if mtp in name and owner in weights
    }


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    if name.endswith((_BIAS, ".bias")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    value: Tensor = torch.randn(shape, generator=generator)
    if name == "model.embed_tokens.weight":
        return value * 0.5
    if name == "lm_head.weight":
        return value * 0.2 / math.sqrt(shape[1])
    value *= 0.5 / math.sqrt(shape[1])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        value /= math.sqrt(2 * config.num_hidden_layers)
    return value


def is_indexer(name: str) -> bool:
    """Whether only the indexer's loss moves this tensor."""
    return ".indexer." in name


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon moves it: inner matrices, not embeddings, heads, gates or vectors."""
    return tensor.dim() == 2 and not any(
        part in name for part in ("embed_tokens", "head", "mlp.gate.", "indexer")
    )
