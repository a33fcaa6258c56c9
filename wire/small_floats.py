"""BF16 and FP8 (E4M3) on numpy, which knows neither: float32 to their bit patterns and back.

Letters: R rows, D hidden, G groups of 128 values of a row.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
Uint16 = npt.NDArray[np.uint16]

GROUP = 128
"""Values of a row that share a scale in FP8."""
MAX_E4M3 = 448.0
_NAN_CODE = 0x7F
_TINY = 1e-30
"""A group whose largest value is smaller than this is all zeros in FP8."""


def to_bfloat16(x: Float32) -> Uint16:
    """The nearest BF16 values, of two equally near the even one; NaN stays NaN. Same shape.

    Example: 1.00390625 lies in the middle of 1 (0x3F80) and 1.0078125 (0x3F81), and gives 0x3F80.
    """
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    is_nan = np.isnan(x)
    if is_nan.any():
        # Rounding carries some NaNs into infinity or past it.
        halves[is_nan] = 0x7FC0
    return halves


def from_bfloat16(halves: Uint16) -> Float32:
    """The values of BF16 bit patterns; same shape."""
    bits = halves.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def to_fp8(x_RD: Float32) -> tuple[Uint8, Float32]:
    """E4M3 codes (R, D) and scales (R, G): value = code * scale, the group's largest value at 448.

    The last group of a row may be short. Rounds to nearest, of two equally near to the even code.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2: online scales, one a 1x128 tile.
    """
    num_rows, hidden = x_RD.shape
    if hidden % GROUP:
        x_RD = np.pad(x_RD, ((0, 0), (0, -hidden % GROUP)))
    x_RGV = x_RD.reshape(num_rows, x_RD.shape[1] // GROUP, GROUP)
    largest_RG = np.abs(x_RGV).max(axis=2, initial=0.0)
    scale_RG: Float32 = largest_RG * np.float32(1 / MAX_E4M3)
    scale_RG[largest_RG < _TINY] = 1
    # A group with an infinity becomes NaN, for whoever reads the sums to refuse.
    scale_RG[np.isinf(scale_RG)] = np.nan
    codes_RD = encode_e4m3(x_RGV / scale_RG[:, :, None]).reshape(x_RD.shape)
    return codes_RD[:, :hidden], scale_RG


def from_fp8(codes_RD: Uint8, scale_RG: Float32) -> Float32:
    """(R, D) float32 of what `to_fp8` gave."""
    num_rows, hidden = codes_RD.shape
    values_RD = decode_e4m3(codes_RD)
    if hidden % GROUP:
        values_RD *= np.repeat(scale_RG, GROUP, axis=1)[:, :hidden]
    else:
        values_RGV = values_RD.reshape(num_rows, hidden // GROUP, GROUP)
        values_RGV *= scale_RG[:, :, None]
    return values_RD


def encode_e4m3(x: Float32) -> Uint8:
    """The nearest E4M3 codes, of two equally near the even one; beyond 448 it is 448. Overwrites `x`."""
    bits = x.view(np.uint32)
    # The upper half decides, when its last bit says whether anything stands in the lower half.
    bits |= (bits & 0xFFFF) + 0xFFFF
    bits >>= 16
    return _codes().take(bits)


def decode_e4m3(codes: Uint8) -> Float32:
    """The values of E4M3 codes; same shape."""
    return _values().take(codes)


@cache
def _values() -> Float32:
    """(256,) the value of every code: sign, 4 bits of exponent biased by 7, 3 of mantissa; 0x7F is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * np.exp2(exponent.astype(np.float64) - 7)
    )
    magnitude[code & 0x7F == _NAN_CODE] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


@cache
def _codes() -> Uint8:
    """(65536,) the code for every upper half of a float32."""
    magnitude = _values()[:_NAN_CODE].astype(np.float64)
    middle = (magnitude[1:] + magnitude[:-1]) / 2
    upper = np.arange(0x8000, dtype=np.uint32)
    value = (upper << 16).view(np.float32)
    is_nan = np.isnan(value)
    value[is_nan] = 0
    below, above = (np.searchsorted(middle, value, side=side) for side in ("left", "right"))
    nearest = np.where(below % 2 == 0, below, above)
    nearest[is_nan] = _NAN_CODE
    return np.concatenate((nearest, nearest | 0x80)).astype(np.uint8)
