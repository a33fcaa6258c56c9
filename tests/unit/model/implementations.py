"""The kernels by name, for tests that run on each of them."""

import functools

import pytest
import torch

from model.kernels.base import Kernels
from model.kernels.choose import choose_kernels
from model.kernels.native.kernels import NativeKernels
from model.kernels.native.library import load_library
from model.kernels.plain import TorchKernels

NATIVE = ("plain", "avx2", "avx512")
IMPLEMENTATIONS = ("torch", *NATIVE)


def named_kernels(name: str, *, num_threads: int = 1) -> Kernels:
    """One of IMPLEMENTATIONS, or `best`: what a worker would take here; always the same object.

    torch's threads are a setting of the process: they count until the next call for torch.
    """
    found = _find(name, num_threads)
    if found is None:
        pytest.skip(f"native kernels {name}: not built here, or not for this processor")
    if found.name == "torch":
        torch.set_num_threads(num_threads)
    return found


@functools.cache
def _find(name: str, num_threads: int) -> Kernels | None:
    if name == "best":
        return choose_kernels(num_threads=num_threads)
    if name == "torch":
        return TorchKernels()
    found = load_library(name)
    return None if found is None else NativeKernels(*found, num_threads=num_threads)
