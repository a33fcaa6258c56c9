"""Rounding to INT8 in C++ against the plain reference."""

import pytest
import torch

from model.kernels.native.fit import fit_columns_of
from model.kernels.native.library import LEVELS, load_library
from model.matrix import ColumnFit, quantize_columns


def _fit(level: str) -> ColumnFit:
    found = load_library(level)
    if found is None:
        pytest.skip(f"the {level} kernels are not built or cannot run here")
    return fit_columns_of(found[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [1, 15, 16, 100, 1024])
def test_codes_and_factors_are_the_references(level: str, width: int) -> None:
    weight_FD = torch.randn(67, width, generator=torch.Generator().manual_seed(width))
    weight_FD[3] = 0.0
    codes_FD, factor_F = _fit(level)(weight_FD)
    expected_FD, wanted_F = quantize_columns(weight_FD)
    assert torch.equal(codes_FD, expected_FD)
    assert torch.equal(factor_F, wanted_F)


@pytest.mark.parametrize("level", LEVELS)
def test_a_view_of_a_wider_matrix_is_rounded(level: str) -> None:
    weight_FD = torch.randn(8, 64)
    codes_FD, factor_F = _fit(level)(weight_FD[:, :40])
    whole_FD, wanted_F = _fit(level)(weight_FD[:, :40].clone())
    assert torch.equal(codes_FD, whole_FD)
    assert torch.equal(factor_F, wanted_F)
