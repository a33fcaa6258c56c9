"""What FORWARD and PARTIAL frames carry: rows and partial sums, in the forms that a cluster chose.

    form of rows   tensors of FORWARD, in this order
    float32        rows (R, D) float32, row_idx (A,) int32, expert_idx (A,) int32, weights (A,) float32
    bfloat16       the same, rows (R, D) uint16
    fp8            the same, rows (R, D) uint8, and behind them scales (R, G) float32, one for 128 values

    form of sums   tensor of PARTIAL
    exact          (R, D) float64
    fp32           (R, D) float32
    bf16           (R, D) uint16

Rows say by their dtype what they are; FORWARD's flags say how the sums are wanted back. Exact sums add up to
the same bits in every order; fp32 and bf16 are rounded before they are added, in the order of the calls:
placement can move a last bit.

Letters: T tokens, D hidden, R rows, A assignments, G groups of 128 values of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from router.experts.plan import Float32, Int32, WorkerCall
from wire.errors import FrameInvalid
from wire.frames import FLAG_SUMS_BF16, FLAG_SUMS_FP32, Array, Frame, FrameKind
from wire.small_floats import GROUP, from_bfloat16, from_fp8, to_bfloat16, to_fp8

RowForm = Literal["float32", "bfloat16", "fp8"]
SumForm = Literal["exact", "fp32", "bf16"]
Sums = npt.NDArray[np.float64] | npt.NDArray[np.float32]

_SUM_FLAGS: tuple[tuple[SumForm, int], ...] = (("fp32", FLAG_SUMS_FP32), ("bf16", FLAG_SUMS_BF16))
_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
_INT32, _UINT16, _UINT8 = np.dtype(np.int32), np.dtype(np.uint16), np.dtype(np.uint8)
_SUM_DTYPES: Mapping[SumForm, np.dtype[Any]] = {"exact": _FLOAT64, "fp32": _FLOAT32, "bf16": _UINT16}
_ROW_DTYPES = (_FLOAT32, _UINT16, _UINT8)
_FRAME_BYTES = 1024
"""More than header, descriptor and paddings of a PARTIAL, and room for the text of an ERROR."""


@dataclass(frozen=True, kw_only=True)
class PayloadForms:
    """How numbers travel between attention and expert workers."""

    rows: RowForm = "float32"
    sums: SumForm = "exact"

    @property
    def flags(self) -> int:
        """FORWARD's flags that ask for this form of sums."""
        return dict(_SUM_FLAGS).get(self.sums, 0)


class ForwardRows(NamedTuple):
    """A FORWARD frame that was checked."""

    x_RD: Float32
    row_idx_A: Int32
    """(A,) row of each assignment, in [0, R)."""
    expert_idx_A: Int32
    weight_A: Float32


def encode_rows(x_TD: Float32, form: RowForm) -> tuple[Array, ...]:
    """The rows of a batch as they travel: (T, D) values, and for fp8 (T, G) scales."""
    if form == "bfloat16":
        return (to_bfloat16(x_TD),)
    return to_fp8(x_TD) if form == "fp8" else (x_TD,)


def forward_tensors(encoded: tuple[Array, ...], call: WorkerCall) -> tuple[Array, ...]:
    """FORWARD's tensors for one call, out of the rows of the whole batch as `encode_rows` gave them."""
    is_whole = len(call.token_idx_R) == len(encoded[0])
    rows, *scales = encoded if is_whole else (part[call.token_idx_R] for part in encoded)
    return (rows, call.row_idx_A, call.expert_idx_A, call.weight_A, *scales)


def read_forward(frame: Frame, *, hidden_size: int) -> ForwardRows:
    """The rows and assignments of a FORWARD frame.

    Raises:
        FrameInvalid: a tensor is missing, or a shape, dtype or row index does not fit.
    """
    dtypes = [tensor.dtype for tensor in frame.tensors]
    if frame.kind is not FrameKind.FORWARD or not dtypes or dtypes[0] not in _ROW_DTYPES:
        raise _not_forward(frame)
    if dtypes[1:] != [_INT32, _INT32, _FLOAT32, *([_FLOAT32] if dtypes[0] == _UINT8 else [])]:
        raise _not_forward(frame)
    rows_RD, row_idx_A, expert_idx_A, weight_A, *scales = frame.tensors
    if rows_RD.ndim != 2 or rows_RD.shape[1] != hidden_size:
        raise FrameInvalid(f"rows have shape {rows_RD.shape}; wanted (R, {hidden_size})", field="shape")
    if not row_idx_A.shape == expert_idx_A.shape == weight_A.shape or row_idx_A.ndim != 1:
        raise FrameInvalid(
            f"assignments have shapes {row_idx_A.shape}, {expert_idx_A.shape}, {weight_A.shape}",
            field="shape",
        )
    # As unsigned numbers negative ones are large, too.
    if row_idx_A.size and np.maximum.reduce(row_idx_A.view(np.uint32)) >= rows_RD.shape[0]:
        raise FrameInvalid(f"an assignment names a row outside [0, {rows_RD.shape[0]})", field="shape")
    return ForwardRows(
        x_RD=_decode_rows(rows_RD, scales),
        row_idx_A=row_idx_A,
        expert_idx_A=expert_idx_A,
        weight_A=weight_A,
    )


def encode_sums(sums_RD: npt.NDArray[np.float64], flags: int) -> Array:
    """Partial sums as FORWARD's flags want them; too large ones become infinite, which the caller refuses."""
    if not flags & (FLAG_SUMS_FP32 | FLAG_SUMS_BF16):
        return sums_RD
    with np.errstate(over="ignore"):
        rounded_RD = sums_RD.astype(np.float32)
    return to_bfloat16(rounded_RD) if flags & FLAG_SUMS_BF16 else rounded_RD


def read_partial(frame: Frame, *, num_rows: int, hidden_size: int, form: SumForm) -> Sums:
    """(R, D) partial sums, float64 if they are exact, else float32.

    Raises:
        FrameInvalid: not a PARTIAL, another shape or form than asked for, or a sum is NaN or infinite.
    """
    dtype, shape = _SUM_DTYPES[form], (num_rows, hidden_size)
    if frame.kind is not FrameKind.PARTIAL or len(frame.tensors) != 1:
        raise _not_partial(frame, dtype, shape)
    given_RD = frame.tensors[0]
    if given_RD.dtype != dtype or given_RD.shape != shape:
        raise _not_partial(frame, dtype, shape)
    sums_RD: Sums = from_bfloat16(given_RD) if form == "bf16" else given_RD
    # One NaN or infinity makes the sum of all one too; finite sums stay far below FP64's limit.
    if not math.isfinite(np.add.reduce(sums_RD, axis=None, dtype=np.float64)):
        raise FrameInvalid("answered sums that are NaN or infinite", field="nonfinite")
    return sums_RD


def max_reply_bytes(frame: Frame) -> int:
    """The bytes that the answer to a FORWARD takes at most: its rows as exact sums."""
    num_values = frame.tensors[0].size if frame.tensors else 0
    return num_values * _FLOAT64.itemsize + _FRAME_BYTES


def _decode_rows(rows_RD: Array, scales: list[Array]) -> Float32:
    if not scales:
        return from_bfloat16(rows_RD) if rows_RD.dtype == np.uint16 else rows_RD
    num_rows, hidden = rows_RD.shape
    wanted = (num_rows, -(-hidden // GROUP))
    if scales[0].shape != wanted:
        raise FrameInvalid(f"scales have shape {scales[0].shape}; wanted {wanted}", field="shape")
    return from_fp8(rows_RD, scales[0])


def _not_partial(frame: Frame, dtype: "np.dtype[Any]", shape: tuple[int, int]) -> FrameInvalid:
    named = [(tensor.dtype.name, tensor.shape) for tensor in frame.tensors]
    return FrameInvalid(f"answered {frame.kind.name} {named}, wanted {[(dtype.name, shape)]}", field="shape")


def _not_forward(frame: Frame) -> FrameInvalid:
    dtypes = tuple(tensor.dtype.name for tensor in frame.tensors)
    return FrameInvalid(
        f"wanted FORWARD with rows, row_idx, expert_idx, weights (and scales of fp8); "
        f"got {frame.kind.name} {dtypes}",
        field="dtype",
    )
