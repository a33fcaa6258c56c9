"""What model/linear.py promises, measured on this host."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.activations import sigmoid, silu
from model.linear import head_linear, linear

SIZES = [(32, 128), (64, 192), (128, 4), (128, 320), (160, 256), (256, 8), (513, 64), (576, 1024)]
LARGE_SIZES = [(1024, 384), (384, 1024), (1024, 576), (1024, 8), (2816, 1024)]


@pytest.fixture(params=[1, 2, 4])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "num_outputs"), SIZES)
def test_linear_is_the_product(width: int, num_outputs: int) -> None:
    x, weight = _random(7, width, seed=1), _random(num_outputs, width, seed=2)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(linear(x, weight), expected, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize(("width", "num_outputs"), [*SIZES, *LARGE_SIZES])
def test_bits_of_a_row_do_not_depend_on_others_or_threads(
    width: int, num_outputs: int, num_threads: int
) -> None:
    x, weight = _random(300, width, seed=3), _random(num_outputs, width, seed=4)
    torch.set_num_threads(1)
    whole = linear(x, weight)
    torch.set_num_threads(num_threads)
    counts = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 255, 299)
    differing = [n for n in counts if not torch.equal(linear(x[-n:], weight), whole[-n:])]
    assert differing == []


@pytest.mark.parametrize("num_terms", [1, 2, 100, 255, 256, 257, 258, 512, 513, 700])
def test_bits_of_a_sum_do_not_change_with_zeros_appended(num_terms: int) -> None:
    x, weight = _random(20, 900, seed=5).abs(), _random(64, 900, seed=6)
    x[:, num_terms:] = 0
    alone = linear(x[:, :num_terms], weight[:, :num_terms])
    lengths = (num_terms + 1, num_terms + 17, 900)
    differing = [n for n in lengths if not torch.equal(linear(x[:, :n], weight[:, :n]), alone)]
    assert differing == []


@settings(max_examples=50)
@given(
    num_rows=st.integers(1, 80),
    width=st.integers(2, 700),
    num_outputs=st.integers(2, 100),
    begin=st.integers(0, 79),
)
def test_any_window_of_rows_has_the_bits_of_the_whole(
    num_rows: int, width: int, num_outputs: int, begin: int
) -> None:
    x, weight = _random(80, width, seed=7), _random(num_outputs, width, seed=8)
    window = slice(begin, begin + num_rows)
    assert torch.equal(linear(x[window], weight), linear(x, weight)[window])


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize(("heads", "width", "num_outputs"), [(4, 32, 128), (16, 128, 512), (2, 8, 16)])
def test_head_linear_keeps_bits(
    heads: int, width: int, num_outputs: int, num_rows: int, num_threads: int
) -> None:
    x, weight = _random(64, heads, width, seed=9), _random(heads, width, num_outputs, seed=10)
    whole = head_linear(x, weight)
    expected = torch.einsum("thn,hnc->thc", x.double(), weight.double()).float()
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(head_linear(x[:num_rows], weight), whole[:num_rows])


@pytest.mark.parametrize("activation", [sigmoid, silu])
@pytest.mark.parametrize("width", [1, 7, 16, 32, 100, 144])
def test_activations_do_not_depend_on_the_place(activation, width: int) -> None:
    x = _random(40, width, seed=11) * 10
    whole = activation(x)
    assert [n for n in range(1, 40) if not torch.equal(activation(x[:n]), whole[:n])] == []


def test_activations_equal_torch() -> None:
    x = torch.tensor([-200.0, -90.0, -5.0, -0.0, 0.3, 12.0, 200.0])
    torch.testing.assert_close(sigmoid(x), torch.sigmoid(x), rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x), rtol=1e-6, atol=1e-35)
