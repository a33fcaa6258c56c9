"""Writes a checkpoint in the HF layout: config.json, safetensors, tokenizer; whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.byte_tokenizer import tokenizer_config
from model.checkpoint import INDEX_FILE, SCALE_SUFFIX, SINGLE_FILE
from model.config import ModelConfig
from model.errors import CheckpointInvalid
from model.fp8_blocks import quantize_blocks
from model.matrix import DEFAULT_BLOCK
from model.sizes import DtypeName
from model.tensor_names import Shapes, expected_tensors

OnProgress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all), scales not counted."""
_ALWAYS_FLOAT32 = ("e_score_correction_bias", "k_norm.weight", "k_norm.bias")
_NEVER_FP8 = ("embed_tokens", "lm_head", "shared_head", "norm.", "mlp.gate.", "weights_proj", "eh_proj")


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """What a checkpoint is made of."""

    hf: Mapping[str, object]
    """config.json."""
    value_of: Callable[[str, tuple[int, ...]], Tensor]
    """(name, shape) -> that tensor in float32; asked once for each, in order."""
    tokenizer: Tokenizer
    dtype: DtypeName = "bfloat16"
    """"fp8" quantises the matrices that the published checkpoint quantises; the others are bfloat16."""


def save_checkpoint(
    out_dir: Path,
    contents: CheckpointContents,
    *,
    num_shards: int = 1,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes a directory that appears whole or not at all.

    Args:
        out_dir: must not exist, or be an empty directory.
        contents: what to write.
        num_shards: files; 1 writes a single file without an index.
        on_progress: called with (tensors written, tensors in all), scales not counted.

    Raises:
        CheckpointInvalid: out_dir is in the way, or cannot be written.
    """
    config = ModelConfig.from_hf(contents.hf)
    block = config.weight_block_size or DEFAULT_BLOCK

    def tensors_of(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return stored_tensors(name, contents.value_of(name, shape), contents.dtype, block=block)

    with stage_directory(out_dir) as partial:
        write_json(partial / "config.json", contents.hf)
        contents.tokenizer.save(str(partial / "tokenizer.json"))
        max_tokens = config.max_position_embeddings
        write_json(partial / "tokenizer_config.json", tokenizer_config(max_tokens=max_tokens))
        write_weights(
            partial,
            expected_tensors(config),
            tensors_of,
            num_shards=num_shards,
            on_progress=on_progress,
        )


@contextmanager
def stage_directory(out_dir: Path) -> Iterator[Path]:
    """A directory to write into: put in out_dir's place when the block ends, removed when it raises.

    A process that is killed leaves a hidden directory beside out_dir, `.NAME.partial-*`.

    Raises:
        CheckpointInvalid: out_dir is in the way, or cannot be written.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointInvalid(str(out_dir), problem="exists already; name another place or remove it")
    partial: Path | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
        yield partial
        partial.chmod(0o755)
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(str(out_dir), problem=f"cannot be written: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file as the published checkpoints have it."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    out_dir: Path,
    shapes: Shapes,
    tensors_of: Callable[[str, tuple[int, ...]], Mapping[str, Tensor]],
    *,
    num_shards: int,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes the weights, one shard after another, so that memory holds one; the index last.

    Args:
        out_dir: a directory with config.json.
        shapes: every tensor, in the order in which they are written.
        tensors_of: (name, shape) -> what the files hold of it: the tensor, and its scale where it has one.
        num_shards: files; 1 writes a single file without an index.
        on_progress: called after each tensor.
    """
    weight_map: dict[str, str] = {}
    num_done, num_bytes = 0, 0
    for shard_idx, names in enumerate(_shards(list(shapes), num_shards)):
        file = SINGLE_FILE if num_shards == 1 else f"model-{shard_idx + 1:05}-of-{num_shards:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= tensors_of(name, shapes[name])
            num_done += 1
            if on_progress is not None:
                on_progress(num_done, len(shapes))
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        # safetensors writes 0600; the other files follow the umask, and a server runs as another user.
        (out_dir / file).chmod((out_dir / "config.json").stat().st_mode)
        weight_map |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if num_shards > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out_dir / INDEX_FILE, index)


def _shards(names: list[str], num_shards: int) -> Iterator[list[str]]:
    """Names in runs of nearly equal length: 10 names in 3 shards are 3, 3, 4."""
    for shard_idx in range(num_shards):
        yield names[len(names) * shard_idx // num_shards : len(names) * (shard_idx + 1) // num_shards]


def is_quantised(name: str) -> bool:
    """Whether the published checkpoint holds this tensor in FP8."""
    return not name.endswith(_ALWAYS_FLOAT32) and not any(part in name for part in _NEVER_FP8)


def stored_tensors(name: str, value: Tensor, dtype: DtypeName, *, block: int) -> dict[str, Tensor]:
    """A float32 tensor as a checkpoint of this type holds it, with its scale when it is quantised."""
    if name.endswith(_ALWAYS_FLOAT32) or dtype == "float32":
        return {name: value}
    if dtype == "bfloat16" or not is_quantised(name):
        return {name: value.to(torch.bfloat16)}
    quantised, scale_inv = quantize_blocks(value, block=block)
    return {name: quantised, name + SCALE_SUFFIX: scale_inv}
