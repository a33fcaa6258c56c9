"""Which kernels this process computes with: the best that are built and that its machine can run."""

import logging
from typing import Literal

import torch

from model.kernels.base import Kernels
from model.kernels.native.kernels import NativeKernels
from model.kernels.native.library import load_library
from model.kernels.plain import TorchKernels

_log = logging.getLogger(__name__)

KernelChoice = Literal["auto", "torch"]
"""auto = the native ones where they run."""


def choose_kernels(
    *, num_threads: int, device: torch.device | str = "cpu", choice: KernelChoice = "auto"
) -> Kernels:
    """The kernels for a device: C++ on processors, torch on GPUs and where nothing was built.

    Args:
        num_threads: threads of arithmetic; explicit, since OpenMP's default takes all cores.
        device: where weights and cache lie.
        choice: whether native ones may be used.
    """
    found = load_library() if torch.device(device).type == "cpu" and choice == "auto" else None
    if found is not None:
        # What is left to torch is small, and its threads would wait beside the kernels' own.
        torch.set_num_threads(1)
        name, library = found
        _log.info("kernels: native %s, %d threads", name, num_threads)
        return NativeKernels(name, library, num_threads=num_threads)
    torch.set_num_threads(num_threads)
    if torch.device(device).type != "cpu" or choice == "torch":
        _log.info("kernels: torch on %s, %d threads", device, num_threads)
    else:
        _log.warning("kernels: torch; the native ones are not built (python -m model.kernels.native.build)")
    return TorchKernels(device)
