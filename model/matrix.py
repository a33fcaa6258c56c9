"""Matrices as a checkpoint stores them and as kernels hold them.

Letters: R rows, D inner width, F outer width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import PendingRows
from model.fp8_blocks import dequantize_blocks, quantize_blocks
from model.precision import Form

INT8_MAX = 127
"""Largest INT8 magnitude used: the codes are symmetrical."""
LOW_UNITS = 128
"""Steps of the low part of a row's value in one step of its high part."""
SMALLEST_MAXIMUM = 1e-30
"""A row whose largest magnitude is below this is rounded to zeros: its inverse would not be a number."""
MAX_FITS = 16
"""Fits of codes and factors to each other at most; they settle after about eight."""
DEFAULT_BLOCK = 128
"""Side of the FP8 blocks made of a matrix that is stored otherwise."""


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A matrix with the bytes of its file."""

    values_FD: Tensor
    """(F, D) float32, bfloat16, float16, float8_e4m3fn or int8; often a view of the mapped file."""
    scale_inv: Tensor | None = None
    """Factors of FP8 blocks, (ceil(F/block), ceil(D/block)) float32."""
    block: int = DEFAULT_BLOCK
    """Side of an FP8 block."""
    factor_F: Tensor | None = None
    """Factor of each output channel of INT8 codes, (F,) float32."""

    @property
    def is_quantised(self) -> bool:
        """Whether its values are codes, which mean something only with their factors."""
        return self.scale_inv is not None or self.factor_F is not None

    @property
    def form(self) -> Form:
        """The form that holds it without rounding."""
        if self.scale_inv is not None:
            return "fp8"
        if self.factor_F is not None:
            return "int8"
        return "bfloat16" if self.values_FD.dtype == torch.bfloat16 else "float32"

    def rows(self, begin: int, end: int) -> "StoredMatrix":
        """Rows [begin, end), as far as there are; begin is a multiple of an FP8 block."""
        blocks = slice(begin // self.block, -(-end // self.block))
        return StoredMatrix(
            values_FD=self.values_FD[begin:end],
            scale_inv=None if self.scale_inv is None else self.scale_inv[blocks],
            block=self.block,
            factor_F=None if self.factor_F is None else self.factor_F[begin:end],
        )

    def to_float32(self) -> Tensor:
        """(F, D) float32, factors multiplied out."""
        if self.scale_inv is not None:
            return dequantize_blocks(self.values_FD, self.scale_inv, block=self.block)
        values_FD = self.values_FD.to(torch.float32)
        return values_FD if self.factor_F is None else values_FD * self.factor_F[:, None]

    def to_blocks(self) -> "StoredMatrix":
        """The same in FP8 blocks; rounds unless it is stored so."""
        if self.scale_inv is not None:
            return self
        values, scale_inv = quantize_blocks(self.to_float32(), block=DEFAULT_BLOCK)
        return StoredMatrix(values_FD=values, scale_inv=scale_inv, block=DEFAULT_BLOCK)

    def to_int8(self, fit: "ColumnFit | None" = None) -> tuple[Tensor, Tensor]:
        """INT8 codes (F, D) and the factor of each output channel (F,); rounds unless it is stored so.

        Args:
            fit: how it is rounded; None = by `quantize_columns`.
        """
        if self.factor_F is not None:
            return self.values_FD, self.factor_F
        return (fit or quantize_columns)(self.to_float32())


class Matrix(Protocol):
    """A weight (F, D) in some form."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""

    def __call__(self, x_RD: Tensor, /) -> Tensor:
        """`x @ W.T`: (R, F) float32 of (R, D) float32; a row's bits do not depend on other rows."""


class JoinedMatrix(Protocol):
    """Several weights that take the same rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""

    def __call__(self, x_RD: Tensor, /) -> tuple[Tensor, ...]:
        """Each one's product: (R, F) float32 of (R, D) float32, each with its own F; may be views."""


class HeadMatrix(Protocol):
    """A weight (F, D) for each of H heads."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""

    def __call__(self, x_RHD: Tensor, /) -> Tensor:
        """Each head's product: (R, H, F) float32 of (R, H, D) float32."""


@dataclass(frozen=True, kw_only=True)
class ApartMatrices:
    """A `JoinedMatrix` of matrices that are multiplied one after another."""

    parts: tuple[Matrix, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that they hold."""
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """Each one's product."""
        return tuple(part(x_RD) for part in self.parts)


class Mlp(Protocol):
    """A SwiGLU: down(silu(gate x) * up x)."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""

    def __call__(self, x_RD: Tensor) -> Tensor:
        """(R, D) float32 of (R, D) float32."""

    def begin(self, x_RD: Tensor) -> PendingRows:
        """The same while the caller does something else, as far as there are threads for it.

        Args:
            x_RD: (R, D) float32, not written to before the rows are there.
        """


ColumnFit = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`quantize_columns`, or another way to the same: kernels have a quicker one."""


def quantize_columns(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (F, D) and the factor of each output channel (F,) float32, fitted to each other.

    The codes are the nearest to a factor, the factor fits the codes best, and so on until no code changes: a
    tenth to a fifth less error than the factor of the largest magnitude alone (docs/precision.md). Example: a
    row (1.0, -0.5) begins with the factor 1/127 and the codes (127, -64); the factor that fits these best is
    159 / (127^2 + 64^2), and the codes stay.
    """
    largest_F = weight_FD.abs().amax(-1)
    factor_F = torch.where(largest_F > SMALLEST_MAXIMUM, largest_F / INT8_MAX, 1.0)
    codes_FD = _nearest_codes(weight_FD, factor_F)
    open_N = torch.arange(len(weight_FD))
    for _ in range(MAX_FITS):
        rows_ND, before_ND = weight_FD[open_N], codes_FD[open_N]
        exact_ND = before_ND.double()
        squares_N = torch.linalg.vecdot(exact_ND, exact_ND)
        products_N = torch.linalg.vecdot(rows_ND.double(), exact_ND)
        fitted_N = torch.where(squares_N > 0, products_N / squares_N, 1.0).float()
        after_ND = _nearest_codes(rows_ND, fitted_N)
        factor_F[open_N], codes_FD[open_N] = fitted_N, after_ND
        open_N = open_N[(after_ND != before_ND).any(-1)]
        if not len(open_N):
            break
    return codes_FD.to(torch.int8), factor_F


def _nearest_codes(weight_FD: Tensor, factor_F: Tensor) -> Tensor:
    return (weight_FD / factor_F[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)


def split_rows(x_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as whole numbers 128 * high + low: high and low (R, D) float32, and the factor of each row (R,).

    Two INT8 products then carry 15 bits of each value. Example: a row (1.0, -0.5) has factor 1 / (127 * 128),
    16256 = 128 * 127 + 0 and -8128 = 128 * -64 + 64.
    """
    largest_R = x_RD.abs().amax(-1)
    inverse_R = _inverse(largest_R)
    whole_RD = (x_RD * inverse_R[..., None] * LOW_UNITS).round()
    high_RD = (whole_RD / LOW_UNITS).round()
    return high_RD, whole_RD - high_RD * LOW_UNITS, largest_R / INT8_MAX / LOW_UNITS


def quantize_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (..., D) float32 in [-127, 127] and the factor of each row (...)."""
    largest_R = x_RD.abs().amax(-1)
    inverse_R = _inverse(largest_R)
    return (x_RD * inverse_R[..., None]).round(), largest_R / INT8_MAX


def _inverse(largest_R: Tensor) -> Tensor:
    """What brings the largest values to 127; 0 where it would not be a number."""
    # Not `127 / largest_R`: torch multiplies by the reciprocal there, and that rounds twice.
    inverse_R = torch.full_like(largest_R, INT8_MAX) / largest_R
    return torch.where(largest_R > SMALLEST_MAXIMUM, inverse_R, 0.0)
