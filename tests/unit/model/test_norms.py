import pytest
import torch

from model.config import INDEXER_NORM_EPS
from model.norms import layer_norm, rms_norm
from tests.reference_data import unit_tensors


def test_rms_norm_equals_the_golden() -> None:
    units = unit_tensors()
    got = rms_norm(units["rmsnorm.x"].float(), units["rmsnorm.w"], eps=1e-6)
    assert torch.equal(got.bfloat16(), units["rmsnorm.y"])


def test_rms_norm_of_the_float32_sum_equals_the_golden() -> None:
    units = unit_tensors()
    total = units["rmsnorm.x"].float() + units["rmsnorm.residual"].float()
    got = rms_norm(total, units["rmsnorm.w"], eps=1e-6)
    assert torch.equal(got.bfloat16(), units["rmsnorm.y_with_residual"])


def test_layer_norm_equals_the_golden() -> None:
    units = unit_tensors()
    got = layer_norm(units["layernorm.x"], units["layernorm.w"], units["layernorm.b"], eps=INDEXER_NORM_EPS)
    torch.testing.assert_close(got, units["layernorm.y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 15, 17])
@pytest.mark.parametrize("width", [32, 100, 144, 1024])
def test_bits_of_a_row_do_not_depend_on_the_others(width: int, num_rows: int) -> None:
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    weight = torch.linspace(0.5, 1.5, width)
    assert torch.equal(rms_norm(x[:num_rows], weight, eps=1e-6), rms_norm(x, weight, eps=1e-6)[:num_rows])
    alone = layer_norm(x[:num_rows], weight, weight, eps=1e-6)
    assert torch.equal(alone, layer_norm(x, weight, weight, eps=1e-6)[:num_rows])
