import json
import logging
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import quantize, save
from model.checkpoint import CHANNEL_SUFFIX, SINGLE_FILE, Checkpoint
from model.config import ModelConfig
from model.errors import CheckpointInvalid
from model.kernels.plain import TorchKernels
from model.make import make_checkpoint
from model.matrix import quantize_columns
from model.quantize import QuantisedName, quantize_checkpoint
from model.summary import summarise
from model.tensor_names import expected_tensors
from tests.unit.model.harness import SMALL_CONFIG, load_model, random_tensors, run_prompt

PROMPT = [75, 104, 111, 111, 114]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """The tiny checkpoint in BF16, in two files."""
    make_checkpoint(tmp_path / "src", num_shards=2)
    return tmp_path / "src"


def _read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in sorted(directory.glob("*.safetensors")) for k, t in load_file(path).items()}


def test_fp8_of_float32_is_what_make_writes_in_fp8(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "float32", dtype="float32", num_shards=3)
    make_checkpoint(tmp_path / "fp8", dtype="fp8", num_shards=3)
    quantize_checkpoint(tmp_path / "float32", tmp_path / "out", to="fp8")
    got, wanted = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("out", "fp8"))
    assert got == wanted


def test_int8_holds_exactly_the_routed_experts(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="int8")
    checkpoint, before, after = Checkpoint.open(tmp_path / "out"), _read_all(src), _read_all(tmp_path / "out")
    checkpoint.check()
    experts = {name for name in before if ".mlp.experts." in name}
    assert set(after) == set(before) | {name + CHANNEL_SUFFIX for name in experts}
    assert {name for name in after if after[name].dtype == torch.int8} == experts
    assert after[EXPERT + CHANNEL_SUFFIX].shape == (32, 1)
    assert after[EXPERT + CHANNEL_SUFFIX].dtype == torch.float32
    assert all(torch.equal(after[name], before[name]) for name in set(before) - experts)


def test_int8_codes_are_the_nearest_to_their_factor(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="int8")
    weight, after = _read_all(src)[EXPERT].float(), _read_all(tmp_path / "out")
    codes, factor = after[EXPERT].float(), after[EXPERT + CHANNEL_SUFFIX]
    is_nearest = (codes * factor - weight).abs() <= factor * 0.5001
    assert bool((is_nearest | (codes.abs() == 127)).all())
    assert torch.equal(codes.to(torch.int8), quantize_columns(weight)[0])


@pytest.mark.parametrize("kernels", [None, TorchKernels()])
def test_int8_copy_computes_what_precision_int8_computes(
    src: Path, tmp_path: Path, kernels: TorchKernels | None
) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="int8")
    wanted = run_prompt(load_model(src, kernels=kernels, precision="int8"), PROMPT).logits
    got = run_prompt(load_model(tmp_path / "out", kernels=kernels, precision="int8"), PROMPT).logits
    assert torch.equal(got, wanted)


def test_int8_copy_is_multiplied_in_int8_as_stored(src: Path, tmp_path: Path) -> None:
    """The head alone differs: it is stored in BF16, and precision int8 rounds it."""
    quantize_checkpoint(src, tmp_path / "out", to="int8")
    runs = [run_prompt(load_model(tmp_path / "out", precision=p), PROMPT) for p in ("auto", "int8")]
    last_layer = max(runs[0].trace.expert_weights)
    assert torch.equal(*(run.trace.expert_weights[last_layer][0] for run in runs))
    assert not torch.equal(*(run.logits for run in runs))


@pytest.mark.parametrize("to", get_args(QuantisedName))
def test_every_precision_computes_a_quantised_copy(src: Path, tmp_path: Path, to: QuantisedName) -> None:
    quantize_checkpoint(src, tmp_path / "out", to=to)
    wanted = run_prompt(load_model(src), PROMPT).logits
    for precision in ("float32", "bfloat16", "fp8", "int8"):
        got = run_prompt(load_model(tmp_path / "out", precision=precision), PROMPT).logits
        assert float((got - wanted).std()) < 0.2 * float(wanted.std())


def test_fp8_and_int8_become_each_other(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "fp8", to="fp8")
    quantize_checkpoint(tmp_path / "fp8", tmp_path / "int8", to="int8")
    quantize_checkpoint(tmp_path / "int8", tmp_path / "again", to="fp8")
    fp8, int8, again = (Checkpoint.open(tmp_path / name) for name in ("fp8", "int8", "again"))
    shapes = expected_tensors(fp8.config)
    for checkpoint in (int8, again):
        checkpoint.check()
    assert {int8.dtype(name) for name in shapes} == {"I8", "BF16", "F32"}
    assert {name: again.dtype(name) for name in shapes} == {name: fp8.dtype(name) for name in shapes}
    for name, shape in shapes.items():
        if ".mlp.experts." not in name:  # a power of two times E4M3 is exact in BF16
            assert torch.equal(int8.read(name, shape=shape), fp8.read(name, shape=shape))


@pytest.mark.parametrize("to", get_args(QuantisedName))
def test_config_changes_in_what_is_quantised_only(src: Path, tmp_path: Path, to: QuantisedName) -> None:
    raw = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float32", "auto_map": {"a": "b"}}))
    quantize_checkpoint(src, tmp_path / "out", to=to)
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = got.pop("quantization_config")
    assert got == {**raw, "auto_map": {"a": "b"}}
    assert quantization["quant_method"] == {"fp8": "fp8", "int8": "compressed-tensors"}[to]
    assert "dtype" not in got


def test_fp8_config_is_the_published_one(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="fp8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }


def test_int8_config_ignores_every_matrix_that_is_not_in_int8(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="int8")
    checkpoint = Checkpoint.open(tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    patterns = [pattern.removeprefix("re:") for pattern in quantization["ignore"]]
    matrices = [name for name, shape in expected_tensors(checkpoint.config).items() if len(shape) == 2]
    for name in matrices:
        is_ignored = any(re.match(pattern, name.removesuffix(".weight")) for pattern in patterns)
        assert is_ignored == (checkpoint.dtype(name) != "I8")
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]


@pytest.mark.parametrize("to", get_args(QuantisedName))
def test_summary_counts_what_the_files_hold(src: Path, tmp_path: Path, to: QuantisedName) -> None:
    quantize_checkpoint(src, tmp_path / "out", to=to)
    summary = summarise(Checkpoint.open(tmp_path / "out"))
    assert sum(summary.dtype_bytes.values()) == sum(t.nbytes for t in _read_all(tmp_path / "out").values())
    assert summary.num_parameters == summarise(Checkpoint.open(src)).num_parameters


def test_small_files_are_copied(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quantize, "SMALL_FILE_BYTES", 20_000)
    (src / "generation_config.json").write_text("{}")
    (src / "big.bin").write_bytes(bytes(20_001))
    (src / ".hidden").touch()
    (src / "inference").mkdir()
    (src / "stray.safetensors").write_bytes(b"not looked at")
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(src, tmp_path / "out", to="int8", num_shards=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    assert "big.bin" in caplog.text


@pytest.mark.parametrize(("num_shards", "num_files"), [(None, 2), (1, 1), (7, 7)])
def test_number_of_files(src: Path, tmp_path: Path, num_shards: int | None, num_files: int) -> None:
    quantize_checkpoint(src, tmp_path / "out", to="fp8", num_shards=num_shards)
    assert summarise(Checkpoint.open(tmp_path / "out")).num_files == num_files


def test_progress_counts_every_tensor_once(src: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(src, tmp_path / "out", to="int8", on_progress=lambda *counts: seen.append(counts))
    total = len(expected_tensors(Checkpoint.open(src).config))
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("to", get_args(QuantisedName))
def test_checkpoint_that_is_quantised_so_already_is_refused(
    src: Path, tmp_path: Path, to: QuantisedName
) -> None:
    quantize_checkpoint(src, tmp_path / "once", to=to)
    with pytest.raises(CheckpointInvalid, match=f"once: is quantised to {to} already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", to=to)
    assert not (tmp_path / "twice").exists()


def test_existing_files_are_not_overwritten(src: Path) -> None:
    before = sorted(path.name for path in src.iterdir())
    with pytest.raises(CheckpointInvalid, match="exists already"):
        quantize_checkpoint(src, src, to="fp8")
    assert sorted(path.name for path in src.iterdir()) == before


def test_empty_directory_is_filled(src: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize_checkpoint(src, tmp_path / "out", to="fp8")
    Checkpoint.open(tmp_path / "out").check()


def test_broken_source_is_named_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match="missing file"):
        quantize_checkpoint(src, tmp_path / "out", to="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such file"):
        quantize_checkpoint(tmp_path / "none", tmp_path / "out", to="fp8")


@pytest.mark.parametrize("to", get_args(QuantisedName))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, to: QuantisedName, value: float) -> None:
    (tmp_path / "src").mkdir()
    tensors = random_tensors(ModelConfig.from_hf(SMALL_CONFIG))
    tensors[EXPERT][1, 2] = value
    save_file(tensors, tmp_path / "src" / SINGLE_FILE)
    (tmp_path / "src" / "config.json").write_text(json.dumps(SMALL_CONFIG))
    with pytest.raises(CheckpointInvalid, match=f"{EXPERT}: has values that are not finite"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_cut_off_run_leaves_nothing(src: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, tmp_path / "out", to="int8", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_half_a_checkpoint_does_not_look_whole(src: Path, tmp_path: Path) -> None:
    """What a killed process would leave behind, at every tensor."""

    def look(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        (partial,) = tmp_path.glob(".out.partial-*")
        with pytest.raises(CheckpointInvalid, match="neither model"):
            Checkpoint.open(partial)

    quantize_checkpoint(src, tmp_path / "out", to="int8", num_shards=3, on_progress=look)
    Checkpoint.open(tmp_path / "out").check()


def test_place_that_cannot_be_written_is_named(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointInvalid, match=r"file/out: cannot be written"):
        quantize_checkpoint(src, tmp_path / "file" / "out", to="fp8")


def test_full_disk_is_named_and_leaves_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", fail)
    with pytest.raises(CheckpointInvalid, match=r"out: cannot be written: .*No space left"):
        quantize_checkpoint(src, tmp_path / "out", to="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
