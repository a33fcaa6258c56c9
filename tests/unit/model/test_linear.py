"""The torch products are the products."""

import pytest
import torch

from model.linear import head_linear, linear

SIZES = [(32, 128), (1, 4), (128, 320), (513, 64), (576, 1024)]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "num_outputs"), SIZES)
def test_linear_is_the_product(width: int, num_outputs: int) -> None:
    x, weight = _random(7, width, seed=1), _random(num_outputs, width, seed=2)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(linear(x, weight), expected, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize(("width", "num_outputs"), SIZES)
def test_head_linear_is_one_product_a_head(width: int, num_outputs: int) -> None:
    x, weight = _random(7, 3, width, seed=1), _random(3, width, num_outputs, seed=2)
    expected = torch.einsum("thn,hnc->thc", x.double(), weight.double()).float()
    torch.testing.assert_close(head_linear(x, weight), expected, rtol=1e-5, atol=1e-5 * width**0.5)
