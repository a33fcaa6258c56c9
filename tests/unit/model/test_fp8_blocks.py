import pytest
import torch

from model.fp8_blocks import dequantize_blocks, quantize_blocks, scale_shape
from tests.reference_data import unit_tensors


@pytest.mark.parametrize("kind", ["float", "ue8m0"])
def test_dequantized_weight_equals_the_golden(kind: str) -> None:
    units = unit_tensors()
    q = units[f"weight.{kind}.q_bytes"].view(torch.float8_e4m3fn)
    got = dequantize_blocks(q, units[f"weight.{kind}.scale_inv"], block=128)
    assert torch.equal(got, units[f"weight.{kind}.dequant"])


def test_quantized_weight_equals_the_golden() -> None:
    units = unit_tensors()
    q, scale_inv = quantize_blocks(units["weight.w"], block=128)
    assert torch.equal(q.view(torch.uint8), units["weight.ue8m0.q_bytes"])
    assert torch.equal(scale_inv, units["weight.ue8m0.scale_inv"])


def test_scales_are_powers_of_two_just_large_enough() -> None:
    weight = torch.zeros(1, 3)
    weight[0] = torch.tensor([448.0, 449.0, 0.0])
    _, scale_inv = quantize_blocks(weight, block=1)
    assert scale_inv[0, :2].tolist() == [1.0, 2.0]


def test_grids_are_rounded_up() -> None:
    assert scale_shape((576, 7168), block=128) == (5, 56)
