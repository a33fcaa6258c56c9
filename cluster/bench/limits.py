"""What the machine can do, measured: how fast it reads memory and multiplies matrices."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from model.kernels.base import Kernels
from model.matrix import StoredMatrix

_MEMORY_BYTES = 1 << 30
_SIDE = 1024
_REPEATS = 20
_Measured = TypeVar("_Measured")


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """Arithmetic: the best rate of several tries; memory: the median of them, as neighbours share it."""

    memory_bytes_per_s: float
    """Reading memory that is in no cache."""
    float32_flops_per_s: float
    """FP32 matrix products, by torch or by Moray's kernels, whichever is faster."""
    int8_ops_per_s: float
    """INT8 matrix products, by torch or by Moray's kernels, whichever is faster."""


def measure_limits(kernels: Kernels, *, num_threads: int) -> MachineLimits:
    """Measures them in about two seconds, on threads of their own: each library keeps helpers for its own.

    Args:
        kernels: Moray's, for the rates that they reach where torch's operators reach less.
        num_threads: threads of torch's operators.
    """
    threads_before = torch.get_num_threads()
    try:
        # Moray's first: torch's helpers go on spinning for a while.
        own_s = _on_own_thread(lambda: _measure_kernels(kernels))
        torch.set_num_threads(num_threads)
        torch_s, memory_s = _on_own_thread(_measure_torch)
    finally:
        torch.set_num_threads(threads_before)
    num_ops = 2 * _SIDE**3
    float32_s, int8_s = (min(pair) for pair in zip(own_s, torch_s, strict=True))
    return MachineLimits(
        memory_bytes_per_s=_MEMORY_BYTES / memory_s,
        float32_flops_per_s=num_ops / float32_s,
        int8_ops_per_s=num_ops / int8_s,
    )


def _on_own_thread(measure: Callable[[], _Measured]) -> _Measured:
    with ThreadPoolExecutor(1, thread_name_prefix="limits") as thread:
        return thread.submit(measure).result()


def _measure_kernels(kernels: Kernels) -> tuple[float, float]:
    """Seconds of Moray's FP32 and INT8 products."""
    kernels.start()
    x, weight = torch.randn(2, _SIDE, _SIDE)
    stored = StoredMatrix(values_FD=weight)
    float32, int8 = kernels.pack(stored, "float32"), kernels.pack(stored, "int8")
    return _best_s(lambda: float32(x)), _best_s(lambda: int8(x))


def _measure_torch() -> tuple[tuple[float, float], float]:
    """Seconds of torch's FP32 and INT8 products, and of reading the memory."""
    x, weight = torch.randn(2, _SIDE, _SIDE)
    codes = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8)
    products_s = _best_s(lambda: x @ weight), _best_s(lambda: torch._int_mm(codes, codes))
    return products_s, statistics.median(_seconds(torch.ones(_MEMORY_BYTES // 4).sum))


def _best_s(run: Callable[[], object]) -> float:
    return min(_seconds(run))


def _seconds(run: Callable[[], object]) -> list[float]:
    """Seconds of some runs after a first one."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return seconds
