"""Routed experts over assigned rows: one matmul per expert, and sums that do not depend on order.

An expert's weighted output is rounded to float32 once per assignment; what is summed is float64. Sums of few
float32 terms are exact in float64 as long as their magnitudes lie within 2^26 of each other, and otherwise
wrong by at most its last bits, 29 bits below what the final rounding to float32 keeps. So how assignments are
grouped, and which worker computes which, does not show.

Letters: R rows here, D hidden, A assignments, T tokens, K top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.batch import PendingRows
from model.checkpoint import Checkpoint
from model.mlp import swiglu
from model.weights import ExpertWeights, OnProgress, load_expert


@dataclass(frozen=True, kw_only=True)
class Assignments:
    """Which row goes to which expert, and with what weight; any order, a row any number of times."""

    row_idx_A: Tensor
    """(A,) int64, row of x_RD."""
    expert_idx_A: Tensor
    """(A,) int64, logical expert."""
    weights_A: Tensor
    """(A,) float32."""

    @classmethod
    def from_choices(cls, ids_TK: Tensor, weights_TK: Tensor) -> "Assignments":
        """The assignments of a gate's choices; id -1 = none.

        Example: ids ((4, 7), (7, -1)) give rows (0, 0, 1) and experts (4, 7, 7).
        """
        is_chosen_TK = ids_TK >= 0
        row_idx_A = is_chosen_TK.nonzero()[:, 0]
        expert_idx_A = ids_TK[is_chosen_TK].to(torch.int64)
        return cls(row_idx_A=row_idx_A, expert_idx_A=expert_idx_A, weights_A=weights_TK[is_chosen_TK])


def expert_partial_sums(
    x_RD: Tensor, assignments: Assignments, experts: Mapping[int, ExpertWeights]
) -> Tensor:
    """Each row's weighted sum over its experts: (R, D) float64, zeros for a row with none.

    Args:
        x_RD: (R, D) float32.
        assignments: rows of x_RD and experts among `experts`.
        experts: logical expert -> weights.

    Raises:
        KeyError: an assignment names an expert that is not in `experts`.
    """
    sums_RD = x_RD.new_zeros(x_RD.shape, dtype=torch.float64)
    order_A = assignments.expert_idx_A.argsort(stable=True)
    counts_E = assignments.expert_idx_A.bincount().tolist()
    for expert_idx, part in enumerate(torch.split(order_A, counts_E)):
        if not len(part):
            continue
        rows = assignments.row_idx_A[part]
        output = swiglu(x_RD[rows], experts[expert_idx]) * assignments.weights_A[part, None]
        sums_RD.index_add_(0, rows, output.to(torch.float64))
    return sums_RD


def expert_partial_sums_reference(
    x_RD: Tensor, assignments: Assignments, experts: Mapping[int, ExpertWeights]
) -> Tensor:
    """The same, bit for bit, one assignment at a time."""
    sums_RD = x_RD.new_zeros(x_RD.shape, dtype=torch.float64)
    for row_idx, expert_idx, weight in zip(
        assignments.row_idx_A.tolist(), assignments.expert_idx_A.tolist(), assignments.weights_A, strict=True
    ):
        output_D = swiglu(x_RD[row_idx : row_idx + 1], experts[expert_idx])[0] * weight
        sums_RD[row_idx] += output_D.to(torch.float64)
    return sums_RD


@dataclass(frozen=True)
class ReadyRows:
    """A `PendingRows` that is already there."""

    rows_TD: Tensor
    """(T, D) float32."""

    def result(self) -> Tensor:
        """The rows."""
        return self.rows_TD


class LocalExperts:
    """A `MoeStep` that holds every expert in this process and combines exactly."""

    def __init__(self, experts: Mapping[int, Mapping[int, ExpertWeights]]) -> None:
        self._experts = experts
        """Layer -> logical expert -> weights."""

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        on_progress: OnProgress | None = None,
    ) -> Self:
        """All experts of a checkpoint, MTP layer included; on_progress counts experts."""
        config = checkpoint.config
        num_all, num_read = len(config.expert_layer_ids) * config.n_routed_experts, 0
        experts: dict[int, dict[int, ExpertWeights]] = {}
        for layer_idx in config.expert_layer_ids:
            experts[layer_idx] = {}
            for expert_idx in range(config.n_routed_experts):
                experts[layer_idx][expert_idx] = load_expert(
                    checkpoint, layer_idx=layer_idx, expert_idx=expert_idx, device=device
                )
                num_read += 1
                if on_progress is not None:
                    on_progress(num_read, num_all)
        return cls(experts)

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        """The routed experts' output of one layer, computed before it returns."""
        assignments = Assignments.from_choices(ids_TK, weights_TK)
        sums_TD = expert_partial_sums(x_TD, assignments, self._experts[layer_idx])
        return ReadyRows(sums_TD.to(torch.float32))
