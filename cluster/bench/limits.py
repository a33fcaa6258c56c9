"""What the machine can do, measured: how fast it reads memory and multiplies matrices."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model.kernels.base import Kernels
from model.matrix import StoredMatrix

_MEMORY_BYTES = 1 << 30
_SIDE = 1024
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """The best rate of several tries each."""

    memory_bytes_per_s: float
    """Reading memory that is in no cache."""
    float32_flops_per_s: float
    """FP32 matrix products, by torch or by Moray's kernels, whichever is faster."""
    int8_ops_per_s: float
    """INT8 matrix products, by torch or by Moray's kernels, whichever is faster."""


def measure_limits(kernels: Kernels, *, num_threads: int) -> MachineLimits:
    """Measures them in about two seconds, on a thread of its own: kernels may bind theirs to processors.

    Args:
        kernels: Moray's, for the rates that they reach where torch's operators reach less.
        num_threads: threads of torch's operators.
    """
    threads_before = torch.get_num_threads()
    with ThreadPoolExecutor(1, thread_name_prefix="limits") as thread:
        try:
            return thread.submit(_measure, kernels, num_threads).result()
        finally:
            torch.set_num_threads(threads_before)


def _measure(kernels: Kernels, num_threads: int) -> MachineLimits:
    torch.set_num_threads(num_threads)
    memory_s = _best_s(torch.ones(_MEMORY_BYTES // 4).sum)
    x, weight = torch.randn(2, _SIDE, _SIDE)
    codes = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8)
    float32_s = _best_s(lambda: x @ weight)
    int8_s = _best_s(lambda: torch._int_mm(codes, codes))
    kernels.start()
    stored = StoredMatrix(values_FD=weight)
    own_float32, own_int8 = kernels.pack(stored, "float32"), kernels.pack(stored, "int8")
    num_ops = 2 * _SIDE**3
    return MachineLimits(
        memory_bytes_per_s=_MEMORY_BYTES / memory_s,
        float32_flops_per_s=num_ops / min(float32_s, _best_s(lambda: own_float32(x))),
        int8_ops_per_s=num_ops / min(int8_s, _best_s(lambda: own_int8(x))),
    )


def _best_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs after a first one."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)
