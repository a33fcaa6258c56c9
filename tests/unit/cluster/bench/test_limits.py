"""The machine's rates, on small matrices; what the measurement leaves behind."""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.bench import limits
from cluster.bench.limits import measure_limits
from model.kernels.base import Kernels
from tests.unit.model.implementations import named_kernels


@pytest.fixture(autouse=True)
def small_and_threads_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_SIDE", 64)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def threads_here_and_in_a_new_thread() -> tuple[int, int]:
    """The engine's thread is made after the measurement, and takes what was set last in any thread."""
    with ThreadPoolExecutor(1) as thread:
        return torch.get_num_threads(), thread.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("name", ["torch", "best"])
def test_rates_are_positive(name: str) -> None:
    found = measure_limits(named_kernels(name), num_threads=1)
    assert min(dataclasses.astuple(found)) > 0


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_of_torch_are_what_they_were(num_threads: int) -> None:
    kernels = named_kernels("best")
    torch.set_num_threads(num_threads)
    measure_limits(kernels, num_threads=3 - num_threads)
    assert threads_here_and_in_a_new_thread() == (num_threads, num_threads)


def test_threads_are_put_back_when_kernels_fail() -> None:
    with pytest.raises(AttributeError):
        measure_limits(object(), num_threads=2)  # type: ignore[arg-type]  # nothing that a kernel can do
    assert threads_here_and_in_a_new_thread() == (1, 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_caller_keeps_its_processors() -> None:
    """Kernels bind the thread that starts them when they may use every processor."""
    processors = os.sched_getaffinity(0)
    kernels: Kernels = named_kernels("best", num_threads=len(processors))
    measure_limits(kernels, num_threads=len(processors))
    assert os.sched_getaffinity(0) == processors
