"""FP8 weights in square blocks with one float32 factor each (weight_scale_inv): to float32 and back."""

import torch
from torch import Tensor

FP8_MAX = 448.0
"""Largest E4M3 value."""
SCALE_FLOOR = 1e-4
"""Smallest maximum of a block that a scale is made from."""


def scale_shape(shape: tuple[int, ...], *, block: int) -> tuple[int, ...]:
    """Shape of the scales of a weight, rounded up: (576, 7168) in blocks of 128 has (5, 56)."""
    return tuple(-(-size // block) for size in shape)


def dequantize_blocks(q_FD: Tensor, scale_inv: Tensor, *, block: int) -> Tensor:
    """The float32 weight: each block times its factor.

    Args:
        q_FD: (F, D) float8_e4m3fn.
        scale_inv: (ceil(F/block), ceil(D/block)) float32.
        block: side of a block.
    """
    num_rows, num_columns = q_FD.shape
    grown = scale_inv.repeat_interleave(block, 0)[:num_rows].repeat_interleave(block, 1)[:, :num_columns]
    return q_FD.to(torch.float32) * grown


def quantize_blocks(weight_FD: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """(F, D) float8_e4m3fn and its factors, powers of two (ue8m0).

    Example: a block whose largest magnitude is 448 gets factor 1, one with 449 gets factor 2.

    Source: deepseek-ai/DeepSeek-V3.2-Exp, inference/kernel.py (2^ceil(log2(amax / 448)), amax at least 1e-4).
    """
    num_rows, num_columns = weight_FD.shape
    pad_rows, pad_columns = -num_rows % block, -num_columns % block
    padded = torch.nn.functional.pad(weight_FD.to(torch.float32), (0, pad_columns, 0, pad_rows))
    tiles = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    amax = tiles.abs().amax((1, 3)).clamp(min=SCALE_FLOOR)
    scale_inv = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    scaled = (tiles / scale_inv[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    q_FD = scaled[:num_rows, :num_columns].to(torch.float8_e4m3fn)
    return q_FD.contiguous(), scale_inv
