"""The two norms: RMSNorm everywhere, and the LayerNorm of the indexer's keys. Letters: T tokens, D width."""

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, row by row in float32: (T, D)."""
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, *, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, row by row in float32: (T, D)."""
    centred_TD = x_TD - x_TD.mean(-1, keepdim=True)
    return centred_TD * torch.rsqrt(centred_TD.square().mean(-1, keepdim=True) + eps) * weight_D + bias_D
