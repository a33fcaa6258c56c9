"""Writes random checkpoints in the HF layout: for tests, benchmarks and a start without a trained model.

Every tensor has its own generator, seeded by (seed, name): values depend neither on shards nor on order.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.byte_tokenizer import FIRST_BYTE_ID, make_tokenizer, tokenizer_config
from model.checkpoint import INDEX_FILE, SCALE_SUFFIX, SINGLE_FILE
from model.config import ModelConfig
from model.errors import CheckpointInvalid
from model.fp8_blocks import quantize_blocks
from model.sizes import DtypeName, SizeName, hf_config
from model.tensor_names import expected_tensors

LOGIT_STD = 2.0
"""Spread of the logits of printable bytes."""
RARE_FACTOR = 0.05
"""Head rows of other tokens are this much smaller, so that greedy text is printable."""
_ALWAYS_FLOAT32 = ("e_score_correction_bias", "k_norm.weight", "k_norm.bias")
_NEVER_FP8 = ("embed_tokens", "lm_head", "shared_head", "norm.", "mlp.gate.", "weights_proj", "eh_proj")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What decides the bytes of a checkpoint."""

    config: ModelConfig
    seed: int
    dtype: DtypeName


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
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointInvalid(str(out_dir), problem="exists already; name another place or remove it")
    hf = hf_config(size, dtype=dtype)
    recipe = _Recipe(config=ModelConfig.from_hf(hf), seed=seed, dtype=dtype)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    try:
        _write_json(partial / "config.json", hf)
        make_tokenizer().save(str(partial / "tokenizer.json"))
        max_tokens = recipe.config.max_position_embeddings
        _write_json(partial / "tokenizer_config.json", tokenizer_config(max_tokens=max_tokens))
        _write_weights(partial, recipe, num_shards, on_progress or _ignore_progress)
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
    out_dir: Path, recipe: _Recipe, num_shards: int, on_progress: Callable[[int, int], None]
) -> None:
    """One shard at a time, so that memory holds one."""
    shapes = expected_tensors(recipe.config)
    weight_map: dict[str, str] = {}
    num_done, num_bytes = 0, 0
    for shard_idx, names in enumerate(_shards(list(shapes), num_shards)):
        file = SINGLE_FILE if num_shards == 1 else f"model-{shard_idx + 1:05}-of-{num_shards:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= _stored(name, shapes[name], recipe)
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


def _stored(name: str, shape: tuple[int, ...], recipe: _Recipe) -> dict[str, Tensor]:
    """A tensor as the files hold it, with its scales when it is quantised."""
    value = _random_tensor(name, shape, recipe)
    if name.endswith(_ALWAYS_FLOAT32) or recipe.dtype == "float32":
        return {name: value}
    if recipe.dtype == "bfloat16" or any(part in name for part in _NEVER_FP8):
        return {name: value.to(torch.bfloat16)}
    block = recipe.config.weight_block_size or 128
    quantised, scale_inv = quantize_blocks(value, block=block)
    return {name: quantised, name + SCALE_SUFFIX: scale_inv}


def _random_tensor(name: str, shape: tuple[int, ...], recipe: _Recipe) -> Tensor:
    """Values that keep every activation near unit size: matrices by their inner width, norms around 1."""
    digest = hashlib.sha256(f"{recipe.seed}:{name}".encode()).digest()
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
