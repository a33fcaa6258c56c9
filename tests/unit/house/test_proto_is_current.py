"""The committed protobuf code is what `make proto` generates from the .proto files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from house_rules import ROOT

PROTO = Path("wire/proto")


def generate(out: Path) -> None:
    """Runs the recipe of `make proto` itself, on the environment that runs this test, into another folder."""
    stamp = f"{sys.prefix}/.installed-dev"
    # Not the flags and jobs of the make that may have started this test.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(ROOT), "-o", stamp, f"VENV={sys.prefix}", f"PROTO_OUT={out}", "proto"]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)


def generated_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*_pb2*.py*")) if path.is_file()}


def differences(committed: dict[str, str], fresh: dict[str, str]) -> list[str]:
    names = sorted({*committed, *fresh})
    return [f"{name} is not current: make proto" for name in names if committed.get(name) != fresh.get(name)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("proto")
    generate(out)
    return generated_files(out / PROTO)


def test_committed_code_is_current(fresh: dict[str, str]) -> None:
    assert fresh
    assert differences(generated_files(ROOT / PROTO), fresh) == []


def test_every_proto_has_code_and_types(fresh: dict[str, str]) -> None:
    for proto in (ROOT / PROTO).glob("*.proto"):
        endings = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
        assert {f"{proto.stem}{ending}" for ending in endings} <= set(fresh)


def test_generated_imports_name_the_package(fresh: dict[str, str]) -> None:
    assert "from wire.proto import control_pb2" in fresh["inference_pb2.py"]


def test_rule_catches_changed_missing_and_left_over_code() -> None:
    found = differences({"a_pb2.py": "1", "gone_pb2.py": "1"}, {"a_pb2.py": "2", "new_pb2.py": "1"})
    assert [line.split()[0] for line in found] == ["a_pb2.py", "gone_pb2.py", "new_pb2.py"]
