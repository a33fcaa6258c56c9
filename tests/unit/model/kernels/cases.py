"""What kernels are given in these tests, how results are compared, and how near they must be."""

from typing import Any

import torch
from torch import Tensor

from model.batch import LayerCache
from model.cache_layout import CacheLayout, KeyForm
from model.config import ModelConfig
from model.fp8_blocks import quantize_blocks
from model.kernels.base import AbsorbedHeads, Kernels
from model.matrix import StoredMatrix
from model.precision import Form
from model.rope import RopeTable
from tests.unit.model.harness import SMALL_CONFIG

FP32_TOLERANCE = 1e-5
"""Largest deviation in units of the largest expected value."""
BF16_TOLERANCE = 2e-2
"""The same where a weight was rounded to bfloat16 on one side only."""


def random(*shape: int, seed: int) -> Tensor:
    """Float32, normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: Tensor, expected: Tensor, *, tolerance: float = FP32_TOLERANCE) -> None:
    """Checks shapes, float32, and the largest deviation against the largest expected value."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    deviation = (got.to(torch.float64) - expected.to(torch.float64)).abs().max()
    assert float(deviation) <= tolerance * float(expected.abs().max())


def config(**changes: Any) -> ModelConfig:
    """A small config with some fields changed."""
    return ModelConfig.from_hf({**SMALL_CONFIG, **changes})


def stored_matrix(
    num_columns: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> StoredMatrix:
    """A matrix as a checkpoint holds it; in FP8 its blocks have sides of 128 and uneven factors."""
    values_FD = random(num_columns, width, seed=seed)
    if dtype == torch.float8_e4m3fn:
        return stored_blocks(values_FD, block=128)
    return StoredMatrix(values_FD=values_FD.to(dtype))


def stored_blocks(values_FD: Tensor, *, block: int) -> StoredMatrix:
    """A matrix in FP8 blocks whose factors are no powers of two."""
    q_FD, scale_inv = quantize_blocks(values_FD, block=block)
    return StoredMatrix(values_FD=q_FD, scale_inv=scale_inv * 1.3, block=block)


def held(stored: StoredMatrix, form: Form) -> Tensor:
    """The float64 weight that a form holds; not for INT8, which rounds activations too."""
    if form == "bfloat16":
        return stored.to_float32().to(torch.bfloat16).to(torch.float64)
    return (stored.to_blocks() if form == "fp8" else stored).to_float32().to(torch.float64)


def rope_table(num_rows: int, width: int, *, seed: int) -> RopeTable:
    """Cosines and sines of any angles."""
    angle_TP = random(num_rows, width // 2, seed=seed) * 3
    return RopeTable(cos_TP=angle_TP.cos(), sin_TP=angle_TP.sin())


def cache_of(
    num_cached: int,
    *,
    layout: CacheLayout,
    append_T: Tensor | None = None,
    seed: int = 0,
) -> LayerCache:
    """Random cache rows; keys of INT8 layouts are to be stored with `store_rows`."""
    return LayerCache(
        layout=layout,
        rows_NW=random(num_cached, layout.width, seed=seed),
        append_T=torch.arange(num_cached) if append_T is None else append_T,
        context_S=(),
    )


def layout_of(
    key_form: KeyForm = "float32", *, latent: int = 24, rope: int = 8, index: int = 16
) -> CacheLayout:
    """A row of odd widths."""
    return CacheLayout(latent=latent, rope=rope, index=index, key_form=key_form)


def shuffled(num: int, *, seed: int) -> Tensor:
    """Cache rows of a sequence, scattered: (num,) int64 below 2 * num."""
    return torch.randperm(2 * num, generator=torch.Generator().manual_seed(seed))[:num]


def identity_heads(kernels: Kernels, num_heads: int, *, latent: int) -> AbsorbedHeads:
    """Queries that are at the latent already, and values that are the latent."""
    heads = kernels.pack_heads(torch.eye(latent).expand(num_heads, -1, -1), "float32")
    return AbsorbedHeads(key_HCN=heads, value_HOC=heads)
