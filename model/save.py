"""Writes a checkpoint in the HF layout: config.json, safetensors, tokenizer; whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.byte_tokenizer import tokenizer_config
from model.checkpoint import INDEX_FILE, SCALE_SUFFIX, SINGLE_FILE
from model.config import ModelConfig
from model.errors import CheckpointInvalid
from model.fp8_blocks import quantize_blocks
from model.sizes import DtypeName
from model.tensor_names import expected_tensors

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
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a directory that appears whole or not at all.

    Args:
        out_dir: must not exist, or be an empty directory.
        contents: what to write.
        num_shards: files; 1 writes a single file without an index.
        on_progress: called with (tensors written, tensors in all), scales not counted.

    Raises:
        CheckpointInvalid: out_dir is in the way.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointInvalid(str(out_dir), problem="exists already; name another place or remove it")
    config = ModelConfig.from_hf(contents.hf)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    try:
        _write_json(partial / "config.json", contents.hf)
        contents.tokenizer.save(str(partial / "tokenizer.json"))
        max_tokens = config.max_position_embeddings
        _write_json(partial / "tokenizer_config.json", tokenizer_config(max_tokens=max_tokens))
        _write_weights(partial, contents, num_shards, on_progress or _ignore_progress)
        partial.chmod(0o755)
        _publish(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _ignore_progress(done: int, total: int) -> None:
    """Takes a progress report and drops it."""


def _publish(partial: Path, out_dir: Path) -> None:
    try:
        partial.rename(out_dir)
    except OSError as error:
        raise CheckpointInvalid(str(out_dir), problem=f"cannot be put in place: {error}") from error


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    out_dir: Path, contents: CheckpointContents, num_shards: int, on_progress: Callable[[int, int], None]
) -> None:
    """One shard at a time, so that memory holds one."""
    config = ModelConfig.from_hf(contents.hf)
    shapes = expected_tensors(config)
    weight_map: dict[str, str] = {}
    num_done, num_bytes = 0, 0
    for shard_idx, names in enumerate(_shards(list(shapes), num_shards)):
        file = SINGLE_FILE if num_shards == 1 else f"model-{shard_idx + 1:05}-of-{num_shards:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            value = contents.value_of(name, shapes[name])
            tensors |= _stored(name, value, contents.dtype, config.weight_block_size or 128)
            num_done += 1
            on_progress(num_done, len(shapes))
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        # safetensors writes 0600; the other files follow the umask, and a server runs as another user.
        (out_dir / file).chmod((out_dir / "config.json").stat().st_mode)
        weight_map |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if num_shards > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out_dir / INDEX_FILE, index)


def _shards(names: list[str], num_shards: int) -> Iterator[list[str]]:
    """Names in runs of nearly equal length: 10 names in 3 shards are 3, 3, 4."""
    for shard_idx in range(num_shards):
        yield names[len(names) * shard_idx // num_shards : len(names) * (shard_idx + 1) // num_shards]


def is_quantised(name: str) -> bool:
    """Whether the published checkpoint holds this tensor in FP8."""
    return not name.endswith(_ALWAYS_FLOAT32) and not any(part in name for part in _NEVER_FP8)


def _stored(name: str, value: Tensor, dtype: DtypeName, block: int) -> dict[str, Tensor]:
    """A tensor as the files hold it, with its scales when it is quantised."""
    if name.endswith(_ALWAYS_FLOAT32) or dtype == "float32":
        return {name: value}
    if dtype == "bfloat16" or not is_quantised(name):
        return {name: value.to(torch.bfloat16)}
    quantised, scale_inv = quantize_blocks(value, block=block)
    return {name: quantised, name + SCALE_SUFFIX: scale_inv}
