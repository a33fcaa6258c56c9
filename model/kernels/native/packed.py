"""Weights in the panels that the native kernels read (layouts in src/gemm.cpp).

Letters: F outputs, D inputs, H heads, R rows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.native.library import Weight
from model.matrix import DEFAULT_BLOCK, ColumnFit, StoredMatrix
from model.precision import Form

PANEL = 32
"""Columns of a panel of floats."""
INT8_PANEL = 64
"""Columns of a panel of INT8."""
PIECE_VALUES = 1 << 18
"""Values that are packed at a time: quick, and nothing beside a matrix of the 671B model."""


class Kind(IntEnum):
    """`enum Kind` of gemm.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FP8 = 2
    INT8 = 3

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return INT8_PANEL if self is Kind.INT8 else PANEL


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight (F, D), or several of one shape behind each other, as the kernels read it."""

    kind: Kind
    num_columns: int
    """F."""
    width: int
    """D."""
    values: Tensor
    """Panels, flat bytes."""
    block: int = 0
    """Columns of D that share an FP8 factor."""
    scales: Tensor | None = None
    """FP8: (panels, ceil(D/block)); INT8: (F padded)."""
    offset: Tensor | None = None
    """INT8: 128 times the sum of each column, (F padded) int32."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        parts = (self.values, self.scales, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def struct(self) -> Weight:
        """What the kernels take; valid while this object lives."""
        return Weight(
            self.kind,
            self.num_columns,
            self.width,
            self.block,
            self.values.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            0 if self.offset is None else self.offset.data_ptr(),
        )


def pack(stored: StoredMatrix, form: Form, *, fit: ColumnFit | None = None) -> Packed:
    """A matrix in panels; `fit` as for `pack_stack`."""
    return pack_stack([stored], form, num_columns=len(stored.values_FD), fit=fit)


def pack_stack(
    parts: Sequence[StoredMatrix],
    form: Form,
    *,
    num_columns: int | None = None,
    fit: ColumnFit | None = None,
) -> Packed:
    """Matrices of one inner width behind each other, each in whole panels.

    They are packed piece by piece into what is held: beside it, memory has one piece.

    Args:
        parts: what is packed; all of one kind.
        form: the form of all.
        num_columns: what a product has; None = all columns, those that fill up panels among them.
        fit: how INT8 is rounded, see `StoredMatrix.to_int8`.
    """
    first = parts[0]
    kind = _kind(first, form)
    num_panels = sum(-(-len(part.values_FD) // kind.panel) for part in parts)
    pieces = (_pack_piece(piece, kind, fit) for part in parts for piece in _pieces(part))
    values, *factors = _fill(pieces, num_panels)
    scales, offset = (*factors, None, None)[:2]
    return Packed(
        kind=kind,
        num_columns=num_panels * kind.panel if num_columns is None else num_columns,
        width=first.values_FD.shape[1],
        values=values.flatten().view(torch.uint8),
        block=_block(first) if kind is Kind.FP8 else 0,
        scales=scales.flatten() if scales is not None and kind is Kind.INT8 else scales,
        offset=None if offset is None else offset.flatten(),
    )


def can_stack(parts: Sequence[StoredMatrix], forms: Sequence[Form]) -> bool:
    """Whether matrices of one inner width, each in its form, can be one."""
    kinds = {(_kind(part, form), _block(part)) for part, form in zip(parts, forms, strict=True)}
    return len(kinds) == 1


def _block(stored: StoredMatrix) -> int:
    """Side of the FP8 blocks that it has, or would get."""
    return stored.block if stored.scale_inv is not None else DEFAULT_BLOCK


def _kind(stored: StoredMatrix, form: Form) -> Kind:
    if form == "fp8" and _block(stored) % PANEL:
        return Kind.BFLOAT16
    return Kind[form.upper()]


def _pieces(stored: StoredMatrix) -> Iterator[StoredMatrix]:
    """Runs of rows of about `PIECE_VALUES`: whole panels and whole blocks."""
    num_rows, width = stored.values_FD.shape
    unit = math.lcm(INT8_PANEL, _block(stored))
    step = max(1, PIECE_VALUES // (unit * width)) * unit
    return (stored.rows(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step))


def _fill(pieces: Iterable[tuple[Tensor, ...]], num_panels: int) -> tuple[Tensor, ...]:
    """The pieces' tensors behind each other; the first axis of each counts panels."""
    whole: tuple[Tensor, ...] = ()
    begin = 0
    for piece in pieces:
        whole = whole or tuple(part.new_empty((num_panels, *part.shape[1:])) for part in piece)
        end = begin + len(piece[0])
        for tensor, part in zip(whole, piece, strict=True):
            tensor[begin:end] = part
        begin = end
    return whole


def _pack_piece(piece: StoredMatrix, kind: Kind, fit: ColumnFit | None) -> tuple[Tensor, ...]:
    """Values, scales and offsets of some panels; the first axis of each counts panels."""
    if kind is Kind.INT8:
        return _pack_int8(*piece.to_int8(fit))
    if kind is Kind.FP8:
        blocks = piece.to_blocks()
        panels = _panels(blocks.values_FD.view(torch.uint8))
        block_of_panel = torch.arange(0, len(panels) * PANEL, PANEL) // blocks.block
        return (panels,) if blocks.scale_inv is None else (panels, blocks.scale_inv[block_of_panel])
    if kind is Kind.FLOAT32:
        return (_panels(piece.to_float32()),)
    values_FD = piece.to_float32() if piece.is_quantised else piece.values_FD
    panels = _panels(values_FD.to(torch.bfloat16).view(torch.int16))
    return (torch.stack((panels[..., : PANEL // 2], panels[..., PANEL // 2 :]), dim=-1),)


def _panels(values_FD: Tensor) -> Tensor:
    """(panels, D, PANEL), zeros behind the last column; a view."""
    padded = functional.pad(values_FD, (0, 0, 0, -len(values_FD) % PANEL))
    return padded.view(-1, PANEL, values_FD.shape[1]).transpose(1, 2)


def _pack_int8(codes_FD: Tensor, factor_F: Tensor) -> tuple[Tensor, ...]:
    missing = -len(codes_FD) % INT8_PANEL
    padded = functional.pad(codes_FD, (0, -codes_FD.shape[1] % 4, 0, missing))
    quads = padded.view(-1, INT8_PANEL, padded.shape[1] // 4, 4).transpose(1, 2)
    scales = functional.pad(factor_F, (0, missing)).view(-1, INT8_PANEL)
    offset = padded.sum(1, dtype=torch.int32).view(-1, INT8_PANEL) * 128
    return quads, scales, offset
