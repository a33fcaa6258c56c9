import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from cluster.cli import checkpoint as command
from model import quantize, sizes
from model.errors import CheckpointInvalid
from tests.reference_data import SHAPES, checkpoint_dir

RUNNER = CliRunner()


@pytest.mark.parametrize("shape", SHAPES)
def test_inspect_gives_one_json_object(shape: str) -> None:
    result = RUNNER.invoke(command.app, ["inspect", str(checkpoint_dir(shape)), "--json"])
    summary = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["path"] == str(checkpoint_dir(shape))
    assert summary["num_mtp_layers"] == (shape == "mtp")
    assert summary["num_parameters"] > summary["num_active_parameters"] > 0
    assert summary["expert_worker_bytes"]["1"] == summary["all_experts_bytes"]


def test_inspect_for_people_names_the_figures() -> None:
    result = RUNNER.invoke(command.app, ["inspect", str(checkpoint_dir("mtp"))], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "2 (1 with experts), 1 MTP" in result.stdout
    assert "16 per layer, 4 of them and 1 shared per token" in result.stdout


def test_make_writes_what_inspect_accepts(tmp_path: Path) -> None:
    arguments = ["make", str(tmp_path / "m"), "--dtype", "fp8", "--shards", "2", "--seed", "5", "--json"]
    made = RUNNER.invoke(command.app, arguments)
    inspected = RUNNER.invoke(command.app, ["inspect", str(tmp_path / "m"), "--json"])
    assert (made.exit_code, inspected.exit_code) == (0, 0)
    assert json.loads(made.stdout) == json.loads(inspected.stdout)
    assert json.loads(made.stdout)["num_files"] == 2


@pytest.mark.parametrize("to", get_args(command.QuantisedName))
def test_quantize_writes_what_inspect_accepts(tmp_path: Path, to: str) -> None:
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    RUNNER.invoke(command.app, ["make", src, "--shards", "3"])
    quantised = RUNNER.invoke(command.app, ["quantize", src, out, "--to", to, "--json"])
    inspected = RUNNER.invoke(command.app, ["inspect", out, "--json"])
    assert (quantised.exit_code, inspected.exit_code) == (0, 0)
    assert json.loads(quantised.stdout) == json.loads(inspected.stdout)
    assert json.loads(quantised.stdout)["num_files"] == 3
    assert {"fp8": "F8_E4M3", "int8": "I8"}[to] in json.loads(quantised.stdout)["dtype_bytes"]


def test_quantize_for_people_names_the_types(tmp_path: Path) -> None:
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    RUNNER.invoke(command.app, ["make", src, "--dtype", "float32"])
    arguments = ["quantize", src, out, "--to", "int8", "--shards", "2"]
    result = RUNNER.invoke(command.app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "I8 1.1 MiB in 2 file(s)" in result.stdout


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    RUNNER.invoke(command.app, ["make", src, "--dtype", "fp8"])
    result = RUNNER.invoke(command.app, ["quantize", src, out, "--to", "fp8"])
    assert result.exit_code == 1
    assert isinstance(result.exception, CheckpointInvalid)
    assert "already" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_broken_checkpoint_names_the_tensor(tmp_path: Path) -> None:
    RUNNER.invoke(command.app, ["make", str(tmp_path / "m"), "--shards", "2"])
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    result = RUNNER.invoke(command.app, ["inspect", str(tmp_path / "m")])
    assert result.exit_code == 1
    assert isinstance(result.exception, CheckpointInvalid)
    assert "missing file" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    result = RUNNER.invoke(command.app, ["make", str(tmp_path)])
    assert result.exit_code == 1
    assert isinstance(result.exception, CheckpointInvalid)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "/no/such/directory"],
        ["inspect"],
        ["make"],
        ["make", "x", "--size", "huge"],
        ["make", "x", "--dtype", "int4"],
        ["make", "x", "--shards", "0"],
        ["make", "x", "--seed", "one"],
        ["quantize", "/no/such/directory", "x", "--to", "fp8"],
        ["quantize", "/tmp", "x"],
        ["quantize", "/tmp", "x", "--to", "int4"],
        ["quantize", "/tmp", "x", "--to", "fp8", "--shards", "0"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(command.app, arguments).exit_code == 2


def test_names_are_those_of_the_model_package() -> None:
    assert get_args(command.SizeName) == get_args(sizes.SizeName)
    assert get_args(command.DtypeName) == get_args(sizes.DtypeName)
    assert get_args(command.QuantisedName) == get_args(quantize.QuantisedName)


def test_module_loads_without_torch() -> None:
    code = "import sys, cluster.cli.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
