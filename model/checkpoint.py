"""Reads a checkpoint directory in the HF layout: config.json, safetensors (one file, or shards and an index).

Opening reads headers only; `read` touches only the bytes of the tensor asked for, so that a worker with 8 of
256 experts never reads the others.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig, load_config
from model.errors import CheckpointInvalid
from model.fp8_blocks import scale_shape
from model.matrix import StoredMatrix
from model.tensor_names import expected_tensors, is_routed_expert

__all__ = ["Checkpoint", "TensorHeader", "expected_tensors"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
"""Behind the name of an FP8 tensor: its blocks' factors."""
CHANNEL_SUFFIX = "_scale"
"""Behind the name of an INT8 tensor: its output channels' factors."""
_FP8 = "F8_E4M3"
_INT8 = "I8"
_QUANTISED = frozenset({_FP8, _INT8})
_READABLE = frozenset({"F32", "BF16", "F16", _FP8})
_READABLE_EXPERT = _READABLE | {_INT8}
_TORCH_TYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    _FP8: torch.float8_e4m3fn,
    _INT8: torch.int8,
}
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header; offsets count from behind the header."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What a file's header says of one tensor."""

    file: str
    """Name of the file in the checkpoint directory."""
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' words: F32, BF16, F16, F8_E4M3, I8."""
    begin_bytes: int
    """Where its values begin in the file."""
    num_bytes: int


class Checkpoint:
    """One checkpoint directory: its config, and its tensors by name."""

    def __init__(
        self, path: Path, config: ModelConfig, headers: Mapping[str, TensorHeader], file_of: Mapping[str, str]
    ) -> None:
        self.path = path
        """Directory that was opened."""
        self.config = config
        """Architecture, from config.json."""
        self._headers = dict(headers)
        self._file_of = dict(file_of)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Reads config.json, the index, and the headers of the files that are there.

        A shard that the index names and that is not there is no error yet: `check` and `read` raise.

        Raises:
            ConfigInvalid: config.json names an architecture that this code does not compute.
            CheckpointInvalid: a file is missing or unreadable.
        """
        config = load_config(path)
        file_of = _read_index(path)
        headers: dict[str, TensorHeader] = {}
        for file in sorted(set(file_of.values())):
            if (path / file).exists():
                headers |= _read_headers(path / file)
        placed = {name: h for name, h in headers.items() if file_of.get(name, h.file) == h.file}
        return cls(path, config, placed, {name: h.file for name, h in placed.items()} | file_of)

    def names(self) -> tuple[str, ...]:
        """All tensors that the index or the files name, scales included, sorted."""
        return tuple(sorted(self._file_of))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return self._header(name).shape

    def dtype(self, name: str) -> str:
        """Type of a tensor as stored: F32, BF16, F16, F8_E4M3, I8."""
        return self._header(name).dtype

    def file_of(self, name: str) -> Path:
        """File that holds a tensor."""
        if name not in self._file_of:
            raise CheckpointInvalid(name, problem="missing tensor")
        return self.path / self._file_of[name]

    def read(self, name: str, *, shape: tuple[int, ...]) -> Tensor:
        """One tensor in float32, factors multiplied out; reads nothing else.

        Raises:
            CheckpointInvalid: it is missing, misshapen, of a type that cannot be read, or has no scales.
        """
        return self.read_stored(name, shape=shape).to_float32()

    def read_stored(self, name: str, *, shape: tuple[int, ...]) -> StoredMatrix:
        """One matrix with the bytes of its file, mapped rather than read.

        Raises:
            CheckpointInvalid: as `read`.
        """
        self._check_tensor(name, shape)
        values, dtype = self._read_raw(name), self.dtype(name)
        if dtype not in _QUANTISED:
            return StoredMatrix(values_FD=values)
        scale_name, _ = self._scale_of(name)
        scale = self._read_raw(scale_name)
        if dtype == _INT8:
            return StoredMatrix(values_FD=values, factor_F=scale.flatten())
        return StoredMatrix(values_FD=values, scale_inv=scale, block=self._block_size(name))

    def check(self) -> None:
        """Looks at the header of every tensor that the config asks for; reads no weight.

        Raises:
            CheckpointInvalid: the first tensor (in the order of the layers) that is missing or misshapen.
        """
        for name, shape in expected_tensors(self.config).items():
            self._check_tensor(name, shape)

    def fingerprint(self) -> str:
        """16 hex digits that tell two checkpoints apart by config, names, types, shapes and file sizes.

        Values are not read: two trainings of one architecture in the same files look alike.
        """
        files = sorted(set(self._file_of.values()))
        sizes = {file: (self.path / file).stat().st_size for file in files if (self.path / file).exists()}
        tensors = {name: [h.dtype, *h.shape] for name, h in sorted(self._headers.items())}
        text = json.dumps([asdict(self.config), sizes, tensors], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _header(self, name: str) -> TensorHeader:
        if name not in self._headers:
            file = self.file_of(name)
            problem = f"missing file {file}" if not file.exists() else f"missing from {file}"
            raise CheckpointInvalid(name, problem=problem)
        return self._headers[name]

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        header = self._header(name)
        if header.shape != shape:
            raise CheckpointInvalid(name, problem="misshapen tensor", wanted=shape, given=header.shape)
        readable = _READABLE_EXPERT if is_routed_expert(name) else _READABLE
        if header.dtype not in readable:
            wanted = ", ".join(sorted(readable))
            raise CheckpointInvalid(name, problem="unsupported dtype", wanted=wanted, given=header.dtype)
        if header.dtype in _QUANTISED:
            self._check_scale(name)

    def _check_scale(self, name: str) -> None:
        scale_name, wanted = self._scale_of(name)
        if scale_name not in self._file_of:
            kind = "INT8" if self.dtype(name) == _INT8 else "FP8"
            raise CheckpointInvalid(scale_name, problem=f"missing scale of {kind} tensor {name}")
        header = self._header(scale_name)
        if header.shape != wanted:
            raise CheckpointInvalid(scale_name, problem="misshapen scale", wanted=wanted, given=header.shape)
        if header.dtype != "F32":
            raise CheckpointInvalid(scale_name, problem="unsupported dtype", wanted="F32", given=header.dtype)

    def _scale_of(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Name of a quantised tensor's scale, and the shape that it must have."""
        shape = self.shape(name)
        if self.dtype(name) == _FP8:
            return name + SCALE_SUFFIX, scale_shape(shape, block=self._block_size(name))
        if not self.config.has_int8_channels:
            problem = "INT8 tensor, but config.json has no quantization_config of INT8 channels"
            raise CheckpointInvalid(name, problem=problem)
        return name + CHANNEL_SUFFIX, (shape[0], 1)

    def _block_size(self, name: str) -> int:
        if self.config.weight_block_size is None:
            problem = "FP8 tensor, but config.json has no quantization_config of FP8 blocks"
            raise CheckpointInvalid(name, problem=problem)
        return self.config.weight_block_size

    def _read_raw(self, name: str) -> Tensor:
        """The values as stored, mapped from their place in the file without a look at its header."""
        file, header = self.file_of(name), self._header(name)
        try:
            # Copy-on-write: a mapping that torch may believe it can write to.
            values = np.memmap(file, np.uint8, mode="c", offset=header.begin_bytes, shape=(header.num_bytes,))
        except (OSError, ValueError) as error:
            raise CheckpointInvalid(name, problem=f"cannot be read from {file}: {error}") from error
        return torch.from_numpy(values).view(_TORCH_TYPES[header.dtype]).reshape(header.shape)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; without an index, the names of the single file."""
    index = path / INDEX_FILE
    if not index.exists():
        single = path / SINGLE_FILE
        if not single.exists():
            raise CheckpointInvalid(str(path), problem=f"neither {INDEX_FILE} nor {SINGLE_FILE}")
        return dict.fromkeys(_read_headers(single), SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointInvalid(str(index), problem=f"no index with a weight_map: {error!r}") from error
    if not isinstance(weight_map, dict):
        raise CheckpointInvalid(str(index), problem="weight_map is not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointInvalid(
                str(index), problem=f"{name} is not in a file of this directory: {file!r}"
            )
    return weight_map


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    """What a file's header says of each tensor; maps the file, reads no weight."""
    headers: dict[str, TensorHeader] = {}
    try:
        # Checks the header: every tensor lies within the file, and none over another.
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            num_header_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            parts = json.loads(opened.read(num_header_bytes))
        for name, part in parts.items():
            if name != "__metadata__":
                begin, end = (_LENGTH_BYTES + num_header_bytes + offset for offset in part["data_offsets"])
                headers[name] = TensorHeader(
                    file=file.name,
                    shape=tuple(part["shape"]),
                    dtype=part["dtype"],
                    begin_bytes=begin,
                    num_bytes=end - begin,
                )
    except (OSError, SafetensorError) as error:
        # safe_open says "no such file" of one that this user may not read.
        problem = (
            f"not a safetensors file: {error}" if os.access(file, os.R_OK) else "this user cannot read it"
        )
        raise CheckpointInvalid(str(file), problem=problem) from error
    return headers
