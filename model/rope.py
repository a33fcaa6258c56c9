"""Rotary position embedding with YaRN, in the two layouts of the model.

MLA turns interleaved pairs (0, 1), (2, 3), ...; the indexer half-split pairs (0, P/2), (1, P/2 + 1), ...
Letters: T tokens, H heads, P rotary width (qk_rope_head_dim).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig, YarnConfig


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """Cosines and sines of some positions, in the layout that `rotate_*` takes."""

    cos_TP: Tensor
    """(T, P/2) float32, YaRN's scale included."""
    sin_TP: Tensor
    """(T, P/2) float32."""


def inverse_frequencies(width: int, *, theta: float, yarn: YarnConfig | None) -> Tensor:
    """Radians per position of each pair: (P/2,) float32.

    YaRN keeps a pair that turns more than beta_fast times over the original context, divides the frequency of
    one that turns less than beta_slow times by the factor, and blends linearly in between.

    Source: YaRN (arXiv 2309.00071), section 3.2; bounds rounded outwards and clamped as DeepSeek does.
    """
    pair_P = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain_P = 1.0 / theta**pair_P
    if yarn is None:
        return plain_P
    low, high = (
        width
        * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    span = max(high - low, 0.001)  # equal bounds would divide by zero
    kept_P = 1 - ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    # In this order: another one moves a frequency by its last bit, and an angle at position 160,000 by 1e-3.
    return plain_P / yarn.factor * (1 - kept_P) + plain_P * kept_P


def rope_table(position_ids_T: Tensor, frequencies_P: Tensor, *, scale: float = 1.0) -> RopeTable:
    """Cosines and sines of positions.

    Args:
        position_ids_T: (T,) int64, >= 0.
        frequencies_P: (P/2,) float32 from `inverse_frequencies`.
        scale: factor on both, `YarnConfig.rope_scale`.
    """
    angles_TP = position_ids_T.to(torch.float32)[:, None] * frequencies_P
    return RopeTable(cos_TP=angles_TP.cos() * scale, sin_TP=angles_TP.sin() * scale)


def rotate_interleaved(x_THP: Tensor, table: RopeTable) -> Tensor:
    """Turns pairs (2i, 2i + 1) of (T, H, P) float32: MLA's layout."""
    even, odd = x_THP[..., 0::2], x_THP[..., 1::2]
    cos, sin = table.cos_TP[:, None], table.sin_TP[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotate_half_split(x_THP: Tensor, table: RopeTable) -> Tensor:
    """Turns pairs (i, i + P/2) of (T, H, P) float32: the indexer's layout."""
    first, second = x_THP.chunk(2, dim=-1)
    cos, sin = table.cos_TP[:, None], table.sin_TP[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def rotate_front(x_TJI: Tensor, table: RopeTable) -> Tensor:
    """Half-split rotation of the first P of I values: the indexer's rope part stands in front."""
    width = 2 * table.cos_TP.shape[-1]
    return torch.cat((rotate_half_split(x_TJI[..., :width], table), x_TJI[..., width:]), dim=-1)


class Rope:
    """The rotary tables of one model, for any positions."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str = "cpu") -> None:
        yarn = config.rope_scaling
        self._frequencies_P = inverse_frequencies(
            config.qk_rope_head_dim, theta=config.rope_theta, yarn=yarn
        ).to(device)
        self._scale = 1.0 if yarn is None else yarn.rope_scale

    def table(self, position_ids_T: Tensor) -> RopeTable:
        """Cosines and sines of (T,) int64 positions."""
        return rope_table(position_ids_T, self._frequencies_P, scale=self._scale)
