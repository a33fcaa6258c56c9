"""Rounding of weights to INT8 in C++; the plain reference is `model.matrix.quantize_columns`."""

import ctypes

import torch
from torch import Tensor

from model.kernels.native.library import load_library
from model.matrix import MAX_FITS, SMALLEST_MAXIMUM, ColumnFit, quantize_columns

_MOST_LANES = 16
"""Values of the widest vector."""


def fit_columns_of(library: ctypes.CDLL) -> ColumnFit:
    """`quantize_columns`, many times as fast: sums are exact but for last bits of FP64."""

    def fit(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
        weight_FD = weight_FD.contiguous()
        num_rows, width = weight_FD.shape
        codes_FD = torch.empty(num_rows, width, dtype=torch.int8)
        factor_F = torch.empty(num_rows)
        padded, code = torch.empty(2, width + _MOST_LANES)
        library.moray_fit_columns(
            weight_FD.data_ptr(), num_rows, width, SMALLEST_MAXIMUM, MAX_FITS,
            padded.data_ptr(), code.data_ptr(), codes_FD.data_ptr(), factor_F.data_ptr(),
        )  # fmt: skip
        return codes_FD, factor_F

    return fit


def best_fit() -> ColumnFit:
    """The quickest way to round weights on this machine."""
    found = load_library()
    return quantize_columns if found is None else fit_columns_of(found[1])
