"""BF16 and FP8 in numpy against torch's types: every bit pattern, every tie, every special value."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wire.small_floats import (
    decode_e4m3,
    encode_e4m3,
    from_bfloat16,
    from_fp8,
    to_bfloat16,
    to_fp8,
)

UPPER = np.arange(65536, dtype=np.uint32) << 16


def floats(lower: int) -> np.ndarray:
    """Every upper half of a float32 with this lower half: all signs, exponents and upper mantissas."""
    return (UPPER | np.uint32(lower)).view(np.float32)


LOWER = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Of ties, their neighbours and the ends."""


@pytest.mark.parametrize("lower", LOWER)
def test_fp8_code_of_every_float_is_torchs_and_saturates(lower):
    x = floats(lower)
    is_number = ~np.isnan(x)
    wanted = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    got = encode_e4m3(x.copy())
    np.testing.assert_array_equal(got[is_number], wanted[is_number])
    assert set(got[~is_number].tolist()) <= {0x7F, 0xFF}


def test_fp8_value_of_every_code_is_torchs():
    codes = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(decode_e4m3(codes), wanted)


@pytest.mark.parametrize("lower", LOWER)
def test_bfloat16_of_every_float_is_torchs(lower):
    x = floats(lower)
    is_number = ~np.isnan(x)
    wanted = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    got = to_bfloat16(x)
    np.testing.assert_array_equal(got[is_number], wanted[is_number])
    assert np.isnan(from_bfloat16(got[~is_number])).all()


def test_bfloat16_comes_back_as_it_is():
    halves = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(from_bfloat16(halves).view(np.uint32), UPPER)


def test_worked_examples():
    """In to_bfloat16's docstring the middle of two values; in a group the largest value is 448 scales."""
    assert to_bfloat16(np.array([1.00390625], np.float32)).tolist() == [0x3F80]
    codes, scale = to_fp8(np.array([[0.5, -1.0, 2.0]], np.float32))
    assert scale.tolist() == [[pytest.approx(2 / 448)]]
    assert from_fp8(codes, scale).tolist() == [[0.5, -1.0, 2.0]]


@given(
    rows=st.integers(0, 5), hidden=st.sampled_from([1, 5, 127, 128, 129, 256, 300]), seed=st.integers(0, 99)
)
def test_fp8_error_is_at_most_a_sixteenth_of_a_value(rows, hidden, seed):
    """Half a step of 3 bits of mantissa, or of the smallest step of the group's scale."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, hidden)) * 10.0 ** rng.integers(-9, 9, (rows, 1))).astype(np.float32)
    codes, scale = to_fp8(x)
    assert (codes.shape, scale.shape) == ((rows, hidden), (rows, -(-hidden // 128)))
    step = np.repeat(scale, 128, axis=1)[:, :hidden] * 2.0**-10
    assert (np.abs(from_fp8(codes, scale) - x) <= np.maximum(np.abs(x) / 16, step) * (1 + 1e-6)).all()


def test_groups_have_scales_of_their_own():
    x = np.concatenate((np.full((1, 128), 1e-3), np.full((1, 128), 1e3)), axis=1).astype(np.float32)
    np.testing.assert_allclose(from_fp8(*to_fp8(x)), x, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-45])
def test_group_of_zeros_or_almost_is_zero(value):
    assert not from_fp8(*to_fp8(np.full((2, 130), value, np.float32))).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(value):
    x = np.ones((1, 200), np.float32)
    x[0, 3] = value
    got = from_fp8(*to_fp8(x))
    assert not np.isfinite(got[0, 3])
    assert (got[0, 128:] == 1).all()
