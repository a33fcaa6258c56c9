"""Every routed expert in one process: a `MoeStep` without a network.

An expert's weighted output is rounded to float32 once per assignment; what is summed is float64. Sums of few
float32 terms are exact in float64 as long as their magnitudes lie within 2^26 of each other, and otherwise
wrong by at most its last bits, 29 bits below what the final rounding to float32 keeps. So how assignments are
grouped, and which worker computes which, does not show.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from model.batch import PendingRows, ReadyRows
from model.checkpoint import Checkpoint
from model.kernels.base import Assignments, Kernels
from model.matrix import Mlp
from model.weights import OnProgress, Packing, load_experts


class LocalExperts:
    """Holds every expert and combines exactly."""

    is_elsewhere = False

    def __init__(self, kernels: Kernels, experts: Mapping[int, Mapping[int, Mlp]]) -> None:
        self._kernels = kernels
        self._experts = {layer_idx: kernels.gather_experts(layer) for layer_idx, layer in experts.items()}
        """Layer -> logical expert -> weights."""

    @classmethod
    def load(cls, checkpoint: Checkpoint, packing: Packing, *, on_progress: OnProgress | None = None) -> Self:
        """All experts of a checkpoint, MTP layer included; on_progress counts experts.

        Raises:
            CheckpointInvalid: a tensor is missing or misshapen.
        """
        config = checkpoint.config
        wanted = [
            (layer_idx, expert_idx)
            for layer_idx in config.expert_layer_ids
            for expert_idx in range(config.n_routed_experts)
        ]
        experts: dict[int, dict[int, Mlp]] = {layer_idx: {} for layer_idx in config.expert_layer_ids}
        for (layer_idx, expert_idx), mlp in load_experts(
            checkpoint, packing, wanted, on_progress=on_progress
        ):
            experts[layer_idx][expert_idx] = mlp
        return cls(packing.kernels, experts)

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        """The routed experts' output of one layer, computed before it returns."""
        assignments = Assignments.from_choices(ids_TK, weights_TK)
        sums_TD = self._kernels.expert_sums(x_TD, assignments, self._experts[layer_idx])
        return ReadyRows(sums_TD.to(torch.float32))
