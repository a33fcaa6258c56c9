"""The compiled library of this machine: found, loaded, and its functions declared."""

import ctypes
import os
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p

from model.kernels.native.build import library_path

LEVELS = ("plain", "avx2", "avx512")
"""What `moray_cpu_level` counts: the best library that a processor can run."""
SPIN_ROUNDS = "2000"
"""How often a thread of the library looks for work before it sleeps, about 10 us: a wake-up costs as much,
and the parallel parts of one step follow each other faster than that. OpenMP's own default is 100 times
more."""


class Weight(ctypes.Structure):
    """`struct Weight` of gemm.h."""

    _fields_ = (
        ("kind", c_int),
        ("num_columns", c_int),
        ("width", c_int),
        ("block", c_int),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("offset", c_void_p),
    )


class ExpandedShape(ctypes.Structure):
    """`struct ExpandedShape` of attention.cpp."""

    _fields_ = (
        ("num_heads", c_int),
        ("nope", c_int),
        ("rope", c_int),
        ("value", c_int),
        ("latent", c_int),
        ("row_stride", c_int64),
    )


class AbsorbedShape(ctypes.Structure):
    """`struct AbsorbedShape` of attention.cpp."""

    _fields_ = (("num_heads", c_int), ("latent", c_int), ("width", c_int), ("row_stride", c_int64))


class IndexerShape(ctypes.Structure):
    """`struct IndexerShape` of indexer.cpp."""

    _fields_ = (("num_heads", c_int), ("width", c_int), ("is_int8", c_int), ("row_stride", c_int64))


class CacheShape(ctypes.Structure):
    """`struct CacheShape` of rows.cpp."""

    _fields_ = (
        ("latent", c_int),
        ("rope", c_int),
        ("index", c_int),
        ("is_int8", c_int),
        ("eps", c_float),
        ("index_eps", c_float),
    )


class GateShape(ctypes.Structure):
    """`struct GateShape` of rows.cpp."""

    _fields_ = (
        ("num_experts", c_int),
        ("num_groups", c_int),
        ("kept_groups", c_int),
        ("top_k", c_int),
        ("scaling", c_float),
        ("floor", c_float),
    )


# fmt: off
ARGUMENTS = {
    "moray_share_heap": (),
    "moray_keep_memory": (),
    "moray_bind_threads": (c_void_p, c_int),
    "moray_gemm": (
        POINTER(Weight), c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int,
    ),
    "moray_experts": (
        c_void_p, c_void_p, c_int, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p,
        c_int,
    ),
    "moray_mlp": (POINTER(Weight), POINTER(Weight), c_void_p, c_int64, c_int, c_void_p, c_int),
    "moray_begin_mlp": (POINTER(Weight), POINTER(Weight), c_void_p, c_int64, c_int, c_void_p, c_int),
    "moray_wait": (c_int64,),
    "moray_rms_norm": (
        c_void_p, c_int64, c_void_p, c_void_p, c_float, c_int, c_int, c_void_p, c_int,
    ),
    "moray_silu_multiply": (c_void_p, c_int, c_int, c_void_p, c_int),
    "moray_rotate": (
        c_void_p, c_int, c_int, c_int64, c_int64, c_int, c_int, c_int, c_void_p, c_void_p, c_int, c_float,
        c_int,
    ),
    "moray_cache_rows": (
        POINTER(CacheShape), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p,
        c_void_p, c_int, c_void_p, c_int64, c_void_p, c_int,
    ),
    "moray_choose_experts": (
        POINTER(GateShape), c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int,
    ),
    "moray_attend_expanded": (
        POINTER(ExpandedShape), POINTER(Weight), c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int,
    ),
    "moray_attend_absorbed": (
        POINTER(AbsorbedShape), POINTER(Weight), POINTER(Weight), c_void_p, c_void_p, c_int, c_void_p,
        c_void_p, c_void_p, c_int,
    ),
    "moray_index_scores": (
        POINTER(IndexerShape), c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int64,
    c_int, ),
    "moray_fit_columns": (
        c_void_p, c_int, c_int, c_float, c_int, c_void_p, c_void_p, c_void_p, c_void_p,
    ),
    "moray_select_positions": (c_void_p, c_int, c_int64, c_void_p, c_int, c_void_p, c_int),
}
# fmt: on
"""Types of every function's arguments."""
RETURNED = {"moray_experts": c_int, "moray_begin_mlp": c_int64}
"""Types of results; the other functions have none."""


def limit_spinning() -> None:
    """Has threads that wait for work sleep soon; a worker beside others calls it before it imports torch.

    OpenMP's library is torch's own, and reads the environment once, when it is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)


def load_library(variant: str | None = None) -> tuple[str, ctypes.CDLL] | None:
    """The name and the functions of the best library that is built and that this processor can run.

    Args:
        variant: avx512, avx2 or plain to have that one; None = the best.

    Returns:
        None where nothing was built, or not that variant.
    """
    limit_spinning()
    plain = _open("plain")
    if plain is None:
        return None
    plain.moray_share_heap()
    runnable = LEVELS[: plain.moray_cpu_level() + 1]
    for name in reversed(runnable):
        library = _open(name) if variant in (None, name) else None
        if library is not None:
            return name, library
    return None


def _open(name: str) -> ctypes.CDLL | None:
    """A library with its functions declared; None if it is not there or cannot be loaded."""
    path = library_path(name)
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # built elsewhere: another machine, another C library
        return None
    for function, arguments in ARGUMENTS.items():
        declared = getattr(library, function)
        declared.argtypes, declared.restype = arguments, RETURNED.get(function)
    return library
