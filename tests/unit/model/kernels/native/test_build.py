import os
import platform
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from model.kernels.native import build as building
from model.kernels.native.build import VARIANTS, BuildFailed, build, library_path, main
from model.kernels.native.kernels import NativeKernels
from model.kernels.native.library import load_library
from model.matrix import StoredMatrix


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _script(path: Path, text: str) -> str:
    """A program in the place of a compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_every_variant_is_built_where_there_is_a_compiler() -> None:
    if _compiler() is None:
        pytest.skip("no C++ compiler")
    here = [v for v in VARIANTS if v.machines is None or platform.machine() in v.machines]
    missing = [variant.name for variant in here if not library_path(variant.name).exists()]
    assert missing == [], "build them: python -m model.kernels.native.build"


def test_built_library_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain variant alone: the others take as long again."""
    if _compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(building, "VARIANTS", VARIANTS[-1:])
    monkeypatch.setattr("model.kernels.native.library.library_path", partial(library_path, folder=tmp_path))
    (tmp_path / "moray_plain-0123456789ab.so").write_bytes(b"of an older source")
    built = build(folder=tmp_path)
    assert list(tmp_path.iterdir()) == built == [library_path("plain", folder=tmp_path)]
    found = load_library()
    assert found is not None
    matrix = NativeKernels(*found, num_threads=1).pack(StoredMatrix(values_FD=torch.eye(3)), "float32")
    assert matrix(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 2.0, 3.0]]


def test_libraries_of_another_source_or_flags_have_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [library_path("plain", folder=tmp_path)]
    (tmp_path / "gemm.cpp").write_text("int x;")
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    names.append(library_path("plain", folder=tmp_path))
    monkeypatch.setattr(building, "FLAGS", ("-O0",))
    names.append(library_path("plain", folder=tmp_path))
    assert len(set(names)) == 3


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_compiler_that_does_not_work_is_named(tmp_path: Path, compiler: str) -> None:
    with pytest.raises(BuildFailed, match=compiler):
        build(folder=tmp_path, environ={"CXX": compiler})


def test_what_a_compiler_says_is_kept(tmp_path: Path) -> None:
    compiler = _script(tmp_path / "g++", "echo 'unknown argument: -march' >&2; exit 1")
    with pytest.raises(BuildFailed, match="unknown argument: -march"):
        build(folder=tmp_path / "lib", environ={"CXX": compiler})


def test_failed_build_leaves_what_was_there(tmp_path: Path) -> None:
    """Also where the compiler wrote half a library."""
    folder = tmp_path / "lib"
    folder.mkdir()
    old = folder / "moray_plain-0123456789ab.so"
    old.write_bytes(b"old")
    half = 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; exit 1'
    with pytest.raises(BuildFailed):
        build(folder=folder, environ={"CXX": _script(tmp_path / "g++", half)})
    assert list(folder.iterdir()) == [old]


def test_no_compiler_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailed, match="install g\\+\\+, or name one in CXX"):
        build(folder=tmp_path, environ={})


def test_main_without_a_compiler_says_so_and_returns_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("native kernels not built, torch computes everything: no C++ compiler found")


def test_main_lists_what_it_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "build", lambda: [Path("lib/a.so"), Path("lib/b.so")])
    assert main() == 0
    assert capsys.readouterr().out == "lib/a.so\nlib/b.so\n"
