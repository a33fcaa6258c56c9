import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, expected_tensors
from model.config import INT8_SCHEME, ModelConfig
from model.errors import CheckpointInvalid
from model.fp8_blocks import dequantize_blocks
from model.kernels.plain import TorchKernels
from model.weights import Packing, load_expert, load_model_weights
from tests.reference_data import SHAPES, checkpoint_dir
from tests.unit.model.harness import SMALL_CONFIG, random_tensors

EXPERT = "model.layers.1.mlp.experts.3."
PACKING = Packing(kernels=TorchKernels(), precision="float32")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small checkpoint in one file, with some tensors changed (None: left out)."""

    def write_checkpoint(changes: dict[str, Tensor | None] | None = None, **config: object) -> Path:
        raw = {**SMALL_CONFIG, **config}
        tensors = random_tensors(ModelConfig.from_hf(raw)) | (changes or {})
        (tmp_path / "config.json").write_text(json.dumps(raw))
        save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / SINGLE_FILE)
        return tmp_path

    return write_checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small checkpoint in two files: expert 3 of layer 1 in the second, everything else in the first."""
    tensors = random_tensors(ModelConfig.from_hf(SMALL_CONFIG))
    second = {name: t for name, t in tensors.items() if name.startswith(EXPERT)}
    save_file({name: t for name, t in tensors.items() if name not in second}, tmp_path / SHARDS[0])
    save_file(second, tmp_path / SHARDS[1])
    weight_map = {name: SHARDS[name in second] for name in tensors}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_checkpoints_pass_the_check(shape: str) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(shape))
    checkpoint.check()
    scales = {name for name in checkpoint.names() if name.endswith("_scale_inv")}
    assert set(checkpoint.names()) - scales == set(expected_tensors(checkpoint.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_read_gives_float32_of_any_float_type(write: Callable[..., Path], dtype: torch.dtype) -> None:
    stored = torch.linspace(-2, 2, 32, dtype=torch.float32).to(dtype)
    got = Checkpoint.open(write({"model.norm.weight": stored})).read("model.norm.weight", shape=(32,))
    assert got.dtype == torch.float32
    assert torch.equal(got, stored.float())


def test_read_multiplies_fp8_blocks_out() -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("fp8"))
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    raw = load_file(checkpoint.file_of(name)) | load_file(checkpoint.file_of(name + "_scale_inv"))
    expected = dequantize_blocks(raw[name], raw[name + "_scale_inv"], block=128)
    assert checkpoint.shape(name) == (160, 256)
    assert checkpoint.dtype(name) == "F8_E4M3"
    assert torch.equal(checkpoint.read(name, shape=(160, 256)), expected)


def test_missing_tensor_is_named(write: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(write({f"{EXPERT}up_proj.weight": None}))
    with pytest.raises(CheckpointInvalid, match=rf"{EXPERT}up_proj.weight: missing tensor"):
        checkpoint.check()
    with pytest.raises(CheckpointInvalid, match=f"{EXPERT}up_proj.weight"):
        load_expert(checkpoint, PACKING, layer_idx=1, expert_idx=3)


def test_misshapen_tensor_is_named_with_both_shapes(write: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(write({"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 15)}))
    with pytest.raises(CheckpointInvalid, match=r"o_proj.weight: misshapen") as caught:
        checkpoint.check()
    assert (caught.value.wanted, caught.value.given) == ((32, 16), (32, 15))
    with pytest.raises(CheckpointInvalid, match=r"o_proj.weight: misshapen"):
        load_model_weights(checkpoint, PACKING)


def test_unsupported_dtype_is_named(write: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(write({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointInvalid, match=r"model.norm.weight: unsupported dtype.*given I8"):
        checkpoint.check()


FP8_NAME = "model.layers.0.mlp.up_proj.weight"
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}


@pytest.mark.parametrize(
    ("scale", "config", "problem"),
    [
        (None, FP8_CONFIG, f"{FP8_NAME}_scale_inv: missing scale of FP8 tensor {FP8_NAME}"),
        (torch.ones(3, 3), FP8_CONFIG, f"{FP8_NAME}_scale_inv: misshapen scale"),
        (torch.ones(3, 2).half(), FP8_CONFIG, f"{FP8_NAME}_scale_inv: unsupported dtype"),
        (torch.ones(3, 2), {}, f"{FP8_NAME}: FP8 tensor, but config.json has no quantization_config"),
    ],
)
def test_fp8_tensor_without_usable_scale(
    write: Callable[..., Path], scale: Tensor | None, config: dict[str, object], problem: str
) -> None:
    changes = {FP8_NAME: torch.ones(48, 32).to(torch.float8_e4m3fn), f"{FP8_NAME}_scale_inv": scale}
    checkpoint = Checkpoint.open(write(changes, **config))
    with pytest.raises(CheckpointInvalid, match=problem):
        checkpoint.check()
    with pytest.raises(CheckpointInvalid, match=problem):
        checkpoint.read(FP8_NAME, shape=(48, 32))


INT8_NAME = f"{EXPERT}up_proj.weight"
INT8_CONFIG = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], **INT8_SCHEME}},
    }
}


def test_read_multiplies_int8_channels_out(write: Callable[..., Path]) -> None:
    codes = torch.arange(16 * 32).reshape(16, 32).remainder(255).sub(127).to(torch.int8)
    factor = torch.linspace(0, 2, 16)[:, None]
    checkpoint = Checkpoint.open(write({INT8_NAME: codes, f"{INT8_NAME}_scale": factor}, **INT8_CONFIG))
    checkpoint.check()
    assert checkpoint.dtype(INT8_NAME) == "I8"
    assert torch.equal(checkpoint.read(INT8_NAME, shape=(16, 32)), codes.float() * factor)


def test_int8_codes_are_held_as_stored(write: Callable[..., Path]) -> None:
    codes, factor = torch.full((16, 32), 3, dtype=torch.int8), torch.full((16, 1), 0.5)
    checkpoint = Checkpoint.open(write({INT8_NAME: codes, f"{INT8_NAME}_scale": factor}, **INT8_CONFIG))
    stored = checkpoint.read_stored(INT8_NAME, shape=(16, 32))
    got_codes, got_factor = stored.to_int8()
    assert stored.form == "int8"
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_factor, factor[:, 0])


@pytest.mark.parametrize(
    ("scale", "config", "problem"),
    [
        (None, INT8_CONFIG, f"{INT8_NAME}_scale: missing scale of INT8 tensor {INT8_NAME}"),
        (torch.ones(16), INT8_CONFIG, rf"{INT8_NAME}_scale: misshapen scale \(wanted \(16, 1\)"),
        (torch.ones(1, 16), INT8_CONFIG, f"{INT8_NAME}_scale: misshapen scale"),
        (torch.ones(16, 1).half(), INT8_CONFIG, f"{INT8_NAME}_scale: unsupported dtype"),
        (torch.ones(16, 1), {}, f"{INT8_NAME}: INT8 tensor, but config.json has no quantization_config"),
        (
            torch.ones(16, 1),
            FP8_CONFIG,
            f"{INT8_NAME}: INT8 tensor, but config.json has no quantization_config",
        ),
    ],
)
def test_int8_tensor_without_usable_scale(
    write: Callable[..., Path], scale: Tensor | None, config: dict[str, object], problem: str
) -> None:
    changes = {INT8_NAME: torch.ones(16, 32).to(torch.int8), f"{INT8_NAME}_scale": scale}
    checkpoint = Checkpoint.open(write(changes, **config))
    with pytest.raises(CheckpointInvalid, match=problem):
        checkpoint.check()
    with pytest.raises(CheckpointInvalid, match=problem):
        checkpoint.read(INT8_NAME, shape=(16, 32))
    with pytest.raises(CheckpointInvalid, match=problem):
        load_expert(checkpoint, PACKING, layer_idx=1, expert_idx=3)


def test_int8_outside_the_routed_experts_is_refused(write: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    changes = {name: torch.ones(32, 16).to(torch.int8), f"{name}_scale": torch.ones(32, 1)}
    with pytest.raises(CheckpointInvalid, match=r"o_proj.weight: unsupported dtype.*given I8"):
        Checkpoint.open(write(changes, **INT8_CONFIG)).check()


def test_fp8_tensor_of_an_int8_config_is_refused(write: Callable[..., Path]) -> None:
    changes = {
        FP8_NAME: torch.ones(48, 32).to(torch.float8_e4m3fn),
        f"{FP8_NAME}_scale_inv": torch.ones(1, 1),
    }
    with pytest.raises(CheckpointInvalid, match=r"no quantization_config of FP8 blocks"):
        Checkpoint.open(write(changes, **INT8_CONFIG)).check()


def test_one_expert_loads_when_only_its_shard_is_there(sharded: Path) -> None:
    whole = load_expert(Checkpoint.open(sharded), PACKING, layer_idx=1, expert_idx=3)
    (sharded / SHARDS[0]).unlink()
    alone = load_expert(Checkpoint.open(sharded), PACKING, layer_idx=1, expert_idx=3)
    x = torch.ones(2, 32)
    assert torch.equal(alone(x), whole(x))
    assert alone.num_bytes == 3 * 16 * 32 * 4


def test_model_weights_load_when_only_an_experts_shard_is_gone(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    weights = load_model_weights(Checkpoint.open(sharded), PACKING)
    assert len(weights.layers) == 2
    assert weights.mtp is not None


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointInvalid, match=rf"{EXPERT}gate_proj.weight: missing file .*{SHARDS[1]}"):
        Checkpoint.open(sharded).check()


def test_tensor_that_its_shard_does_not_hold_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = SHARDS[1]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointInvalid, match=rf"model.norm.weight: missing from .*{SHARDS[1]}"):
        Checkpoint.open(sharded).check()


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    with pytest.raises(CheckpointInvalid, match=r"neither model.safetensors.index.json nor"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no index with a weight_map"),
        ("{}", "no index with a weight_map"),
        ("[]", "no index with a weight_map"),
        ('{"weight_map": []}', "weight_map is not an object"),
        ('{"weight_map": {"a": "../b"}}', "a is not in a file of this directory"),
        ('{"weight_map": {"a": 3}}', "a is not in a file of this directory"),
    ],
)
def test_broken_index(sharded: Path, text: str, problem: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointInvalid, match=problem):
        Checkpoint.open(sharded)


def test_file_cut_short_is_named(sharded: Path) -> None:
    whole = (sharded / SHARDS[1]).read_bytes()
    (sharded / SHARDS[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointInvalid, match=rf"{SHARDS[1]}: not a safetensors file"):
        Checkpoint.open(sharded)


def test_fingerprint_is_stable_and_tells_checkpoints_apart(sharded: Path) -> None:
    prints = [Checkpoint.open(checkpoint_dir(shape)).fingerprint() for shape in (*SHAPES, SHAPES[0])]
    assert len(set(prints)) == len(SHAPES)
    before = Checkpoint.open(sharded).fingerprint()
    config = {**SMALL_CONFIG, "routed_scaling_factor": 2.0}
    (sharded / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(sharded).fingerprint() != before
