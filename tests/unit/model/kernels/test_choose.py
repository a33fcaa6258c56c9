import logging

import pytest
import torch

from model.kernels.choose import choose_kernels
from model.kernels.native.kernels import NativeKernels
from model.kernels.native.library import load_library
from model.kernels.plain import TorchKernels


def _must_not_load() -> None:
    raise AssertionError("looked for a native library")


def test_best_native_library_is_taken_where_one_runs() -> None:
    found = load_library()
    if found is None:
        pytest.skip("native kernels are not built here")
    chosen = choose_kernels(num_threads=1)
    assert isinstance(chosen, NativeKernels)
    assert chosen.name == found[0]


def test_torch_is_taken_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.choose.load_library", _must_not_load)
    chosen = choose_kernels(num_threads=1, choice="torch")
    assert isinstance(chosen, TorchKernels)
    assert chosen.name == "torch"


def test_torch_is_taken_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.choose.load_library", _must_not_load)
    assert isinstance(choose_kernels(num_threads=1, device="meta"), TorchKernels)


def test_missing_library_falls_back_to_torch_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("model.kernels.choose.load_library", lambda: None)
    with caplog.at_level(logging.WARNING):
        chosen = choose_kernels(num_threads=1)
    assert isinstance(chosen, TorchKernels)
    assert ["not built" in record.message for record in caplog.records] == [True]


def test_choice_that_falls_back_to_nothing_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose_kernels(num_threads=1, choice="torch")
    assert caplog.records == []


@pytest.mark.parametrize("num_threads", [1, 2])
def test_torch_computes_with_the_threads_asked_for(num_threads: int) -> None:
    choose_kernels(num_threads=num_threads, choice="torch")
    assert torch.get_num_threads() == num_threads


def test_torch_gets_one_thread_beside_native_kernels() -> None:
    if load_library() is None:
        pytest.skip("native kernels are not built here")
    torch.set_num_threads(2)
    choose_kernels(num_threads=2)
    assert torch.get_num_threads() == 1
