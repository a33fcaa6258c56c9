"""Trained weights as a checkpoint in the HF layout."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from model.save import CheckpointContents, save_checkpoint
from model.sizes import DtypeName


def export_checkpoint(
    out_dir: Path,
    weights: Mapping[str, Tensor],
    *,
    hf: Mapping[str, object],
    tokenizer: Tokenizer,
    dtype: DtypeName,
) -> None:
    """Writes `out_dir`, which must not exist.

    Raises:
        CheckpointInvalid: out_dir is in the way.
    """
    save_checkpoint(
        out_dir,
        CheckpointContents(
            hf=hf,
            # A copy each: MTP's embedding and head are the main ones, and a file holds no shared memory.
            value_of=lambda name, shape: weights[name].detach().clone().reshape(shape),
            tokenizer=tokenizer,
            dtype=dtype,
        ),
    )
