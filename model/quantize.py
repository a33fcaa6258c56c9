"""Writes a checkpoint anew in FP8 blocks, or with its routed experts in INT8.

Tensors are read one by one and written shard by shard, so memory holds one shard of the new checkpoint.

| target | matrices that are quantised          | the other matrices | config.json names |
|--------|--------------------------------------|--------------------|-------------------|
| `fp8`  | those of the published checkpoint    | BF16               | DeepSeek's fp8    |
| `int8` | routed experts, a factor for each output channel | BF16   | compressed-tensors, int-quantized |
"""

import json
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from model.checkpoint import CHANNEL_SUFFIX, INDEX_FILE, Checkpoint
from model.config import INT8_SCHEME
from model.errors import CheckpointInvalid
from model.kernels.native.fit import best_fit
from model.matrix import DEFAULT_BLOCK, StoredMatrix
from model.save import OnProgress, is_quantised, stage_directory, stored_tensors, write_json, write_weights
from model.sizes import hf_config
from model.tensor_names import expected_tensors, is_routed_expert

_log = logging.getLogger(__name__)

QuantisedName = Literal["fp8", "int8"]

SMALL_FILE_BYTES = 64 << 20
"""Files beside the weights that are larger are not copied."""
_ALL_BUT_EXPERTS = r"re:(?!.*\.mlp\.experts(\.|$)).*"
"""compressed-tensors' name of every module outside the routed experts, joined ones such as qkv_a_proj too."""


def quantize_checkpoint(
    src_dir: Path,
    out_dir: Path,
    *,
    to: QuantisedName,
    num_shards: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes a quantised copy of a checkpoint; the directory appears whole or not at all.

    Tensors that the config does not ask for and folders are left behind; small files are copied.

    Args:
        src_dir: a checkpoint in the HF layout, in any type that `Checkpoint` reads.
        out_dir: must not exist, or be an empty directory.
        to: what is written.
        num_shards: files; None = as many as src_dir has.
        on_progress: called with (tensors written, tensors in all), scales not counted.

    Raises:
        ConfigInvalid: src_dir's config.json cannot be used.
        CheckpointInvalid: src_dir is broken, or quantised so already, or has a weight that is not finite;
            or out_dir is in the way, or cannot be written.
    """
    checkpoint = Checkpoint.open(src_dir)
    checkpoint.check()
    if _held_as(checkpoint) == to:
        raise CheckpointInvalid(str(src_dir), problem=f"is quantised to {to} already")
    shapes = expected_tensors(checkpoint.config)
    num_files = len({checkpoint.file_of(name) for name in shapes})
    with stage_directory(out_dir) as staged:
        write_json(staged / "config.json", _config(src_dir, to))
        _copy_small_files(src_dir, staged)
        write_weights(
            staged,
            shapes,
            partial(_quantised_tensors, checkpoint, to),
            num_shards=num_shards or num_files,
            on_progress=on_progress,
        )


def _held_as(checkpoint: Checkpoint) -> QuantisedName | None:
    if checkpoint.config.weight_block_size is not None:
        return "fp8"
    return "int8" if checkpoint.config.has_int8_channels else None


def _quantised_tensors(
    checkpoint: Checkpoint, to: QuantisedName, name: str, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """One tensor as the new files hold it, with its scale when it is quantised."""
    value = checkpoint.read(name, shape=shape)
    is_rounded = is_quantised(name) if to == "fp8" else is_routed_expert(name)
    if is_rounded and not bool(value.isfinite().all()):
        raise CheckpointInvalid(name, problem="has values that are not finite, which cannot be quantised")
    if to == "int8" and is_rounded:
        codes_FD, factor_F = StoredMatrix(values_FD=value).to_int8(best_fit())
        return {name: codes_FD, name + CHANNEL_SUFFIX: factor_F[:, None]}
    return stored_tensors(name, value, "fp8" if to == "fp8" else "bfloat16", block=DEFAULT_BLOCK)


def _config(src_dir: Path, to: QuantisedName) -> dict[str, object]:
    """config.json of the copy: everything else as it was."""
    hf: dict[str, object] = json.loads((src_dir / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "dtype"):
        if key in hf:
            hf[key] = "bfloat16"
    return {**hf, "quantization_config": _fp8_config() if to == "fp8" else _int8_config()}


def _fp8_config() -> object:
    """What `moray checkpoint make --dtype fp8` writes, which is what DeepSeek published."""
    return hf_config("tiny", dtype="fp8")["quantization_config"]


def _int8_config() -> Mapping[str, object]:
    """Source: vllm-project/compressed-tensors, QuantizationConfig and CompressionFormat.int_quantized."""
    group = {"targets": ["Linear"], **INT8_SCHEME, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [_ALL_BUT_EXPERTS],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _copy_small_files(src_dir: Path, out_dir: Path) -> None:
    """Tokenizer, generation config, license: what is neither config.json nor weights."""
    for path in sorted(src_dir.iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name == INDEX_FILE
        if not path.is_file() or is_weights or path.name.startswith(".") or path.name == "config.json":
            continue
        if path.stat().st_size > SMALL_FILE_BYTES:
            _log.warning("not copied, %d bytes: %s", path.stat().st_size, path)
            continue
        shutil.copyfile(path, out_dir / path.name)
