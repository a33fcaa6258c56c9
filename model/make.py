"""Writes random checkpoints in the HF layout: for tests, benchmarks and a start without a trained model.

Every tensor has its own generator, seeded by (seed, name): values depend neither on shards nor on order.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.byte_tokenizer import FIRST_BYTE_ID, make_tokenizer
from model.save import CheckpointContents, save_checkpoint
from model.sizes import DtypeName, SizeName, hf_config

LOGIT_STD = 2.0
"""Spread of the logits of printable bytes."""
RARE_FACTOR = 0.05
"""Head rows of other tokens are this much smaller, so that greedy text is printable."""


def make_checkpoint(
    out_dir: Path,
    *,
    size: SizeName = "tiny",
    seed: int = 0,
    dtype: DtypeName = "bfloat16",
    num_shards: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes config.json, the weights and a byte tokenizer; the directory appears whole or not at all.

    Args:
        out_dir: must not exist, or be an empty directory.
        size: one of `model.sizes.SIZES`.
        seed: the same seed gives the same values.
        dtype: "fp8" quantises the matrices that the published checkpoint quantises, the others are bfloat16.
        num_shards: files; 1 writes a single file without an index.
        on_progress: called with (tensors written, tensors in all), scales not counted.

    Raises:
        CheckpointInvalid: out_dir is in the way.
    """
    contents = CheckpointContents(
        hf=hf_config(size, dtype=dtype),
        value_of=partial(_random_tensor, seed=seed),
        tokenizer=make_tokenizer(),
        dtype=dtype,
    )
    save_checkpoint(out_dir, contents, num_shards=num_shards, on_progress=on_progress)


def _random_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Values that keep every activation near unit size: matrices by their inner width, norms around 1."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    value = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return value * 0.02
    if name.endswith(".bias"):
        return value * 0.1
    if len(shape) == 1:
        return 1.0 + value * 0.1
    if "embed_tokens" in name:
        return value
    value *= shape[1] ** -0.5
    if name.endswith(("lm_head.weight", "shared_head.head.weight")):
        is_printable = torch.zeros(shape[0], 1, dtype=torch.bool)
        is_printable[FIRST_BYTE_ID + 32 : FIRST_BYTE_ID + 127] = True
        value *= torch.where(is_printable, LOGIT_STD, LOGIT_STD * RARE_FACTOR)
    return value
