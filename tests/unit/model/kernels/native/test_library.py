from functools import partial
from pathlib import Path

import pytest
import torch

from model.kernels.base import Assignments
from model.kernels.native.build import VARIANTS, library_path
from model.kernels.native.library import LEVELS, load_library
from model.kernels.plain import TorchKernels
from model.matrix import StoredMatrix
from tests.unit.model.implementations import NATIVE, named_kernels


def test_every_variant_has_a_level() -> None:
    assert {variant.name for variant in VARIANTS} == set(LEVELS) == set(NATIVE)


@pytest.mark.parametrize("name", NATIVE)
def test_variant_that_is_named_is_loaded(name: str) -> None:
    assert named_kernels(name).name == name


def test_best_variant_is_loaded_unless_one_is_named() -> None:
    best = load_library()
    if best is None:
        pytest.skip("native kernels are not built here")
    runnable = [name for name in LEVELS if load_library(name) is not None]
    assert best[0] == runnable[-1]


def test_unknown_variant_is_none() -> None:
    assert load_library("sse9") is None


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_library_that_cannot_be_loaded_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr("model.kernels.native.library.library_path", partial(library_path, folder=tmp_path))
    if content is not None:
        library_path("plain", folder=tmp_path).write_bytes(content)
    assert load_library() is None


def test_weights_of_other_kernels_are_refused() -> None:
    one = StoredMatrix(values_FD=torch.eye(2))
    experts = {0: TorchKernels().pack_mlp(one, one, one, "float32")}
    choice = Assignments.from_choices(torch.tensor([[0]]), torch.ones(1, 1))
    with pytest.raises(TypeError, match="PlainMlp was packed by other kernels"):
        named_kernels("plain").expert_sums(torch.ones(1, 2), choice, experts)
