import pytest
import torch
from torch import Tensor

from model.fp8_blocks import quantize_blocks
from model.kernels.plain import PlainInt8Matrix, TorchKernels
from model.matrix import StoredMatrix, quantize_columns
from model.precision import Form
from tests.unit.model.implementations import IMPLEMENTATIONS, named_kernels

WEIGHT_FD = torch.randn(70, 36, generator=torch.Generator().manual_seed(0))
X_RD = torch.randn(5, 36, generator=torch.Generator().manual_seed(1))


def _blocks() -> StoredMatrix:
    q_FD, scale_inv = quantize_blocks(WEIGHT_FD, block=32)
    return StoredMatrix(values_FD=q_FD, scale_inv=scale_inv, block=32)


def _channels() -> StoredMatrix:
    """Codes of at most 100: made anew they would reach 127."""
    codes_FD = (WEIGHT_FD * 25).clamp(-100, 100).to(torch.int8)
    return StoredMatrix(values_FD=codes_FD, factor_F=torch.linspace(0.01, 0.02, 70))


STORED = {
    "float32": StoredMatrix(values_FD=WEIGHT_FD),
    "bfloat16": StoredMatrix(values_FD=WEIGHT_FD.to(torch.bfloat16)),
    "fp8": _blocks(),
    "int8": _channels(),
}


@pytest.mark.parametrize("form", STORED)
def test_form_is_the_one_that_does_not_round(form: Form) -> None:
    assert STORED[form].form == form
    assert STORED[form].is_quantised == (form in ("fp8", "int8"))


def test_int8_is_multiplied_out_by_channel() -> None:
    stored = StoredMatrix(
        values_FD=torch.tensor([[127, -64], [1, 0]], dtype=torch.int8), factor_F=torch.tensor([0.5, 3.0])
    )
    assert torch.equal(stored.to_float32(), torch.tensor([[63.5, -32.0], [3.0, 0.0]]))


def test_stored_int8_is_not_quantised_again() -> None:
    stored = STORED["int8"]
    codes_FD, factor_F = stored.to_int8()
    assert codes_FD is stored.values_FD
    assert factor_F is stored.factor_F


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_other_forms_are_quantised_to_int8(form: Form) -> None:
    codes_FD, factor_F = STORED[form].to_int8()
    weight_FD = STORED[form].to_float32()
    error_FD = (codes_FD * factor_F[:, None] - weight_FD).abs()
    is_nearest_FD = error_FD <= factor_F[:, None] * 0.5001
    assert bool((is_nearest_FD | (codes_FD.abs() == 127)).all())
    largest_F = weight_FD.abs().amax(-1, keepdim=True) / 127
    plain_FD = ((weight_FD / largest_F).round() * largest_F - weight_FD).abs()
    assert bool((error_FD.square().sum(-1) <= plain_FD.square().sum(-1) * (1 + 1e-6)).all())


def test_codes_and_factor_are_fitted_to_each_other() -> None:
    codes_FD, factor_F = quantize_columns(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    assert codes_FD.tolist() == [[127, -64], [0, 0]]
    assert factor_F.tolist() == pytest.approx([159 / (127**2 + 64**2), 1.0])


def test_int8_becomes_fp8_blocks_of_its_products() -> None:
    blocks, expected = STORED["int8"].to_blocks(), quantize_blocks(STORED["int8"].to_float32(), block=128)
    assert blocks.scale_inv is not None
    assert torch.equal(blocks.values_FD.float(), expected[0].float())
    assert torch.equal(blocks.scale_inv, expected[1])


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize(("begin", "end"), [(0, 32), (32, 64), (64, 70), (32, 70)])
def test_rows_are_those_of_the_whole(stored: StoredMatrix, begin: int, end: int) -> None:
    assert torch.equal(stored.rows(begin, end).to_float32(), stored.to_float32()[begin:end])


def test_torch_kernels_hold_stored_codes() -> None:
    held = TorchKernels().pack(STORED["int8"], "int8")
    assert isinstance(held, PlainInt8Matrix)
    assert torch.equal(held.codes_FD, STORED["int8"].values_FD)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_kernel_computes_with_the_stored_codes(name: str) -> None:
    got_RF = named_kernels(name).pack(STORED["int8"], "int8")(X_RD)
    assert torch.equal(got_RF, _product_of_codes(STORED["int8"]))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_stored_int8_is_held_in_other_forms_by_value(name: str, form: Form) -> None:
    kernels, stored = named_kernels(name), STORED["int8"]
    expected_RF = kernels.pack(StoredMatrix(values_FD=stored.to_float32()), form)(X_RD)
    assert torch.equal(kernels.pack(stored, form)(X_RD), expected_RF)


def _product_of_codes(stored: StoredMatrix) -> Tensor:
    """Rows as 15-bit whole numbers, times codes: exact sums, rounded once for each part."""
    assert stored.factor_F is not None
    largest_R = X_RD.abs().amax(-1)
    whole_RD = (X_RD * (torch.full_like(largest_R, 127) / largest_R)[:, None] * 128).round()
    high_RD = (whole_RD / 128).round()
    codes_DF = stored.values_FD.double().T
    high_RF, low_RF = ((part.double() @ codes_DF).float() for part in (high_RD, whole_RD - high_RD * 128))
    return (high_RF * 128 + low_RF) * (largest_R / 127 / 128)[:, None] * stored.factor_F
