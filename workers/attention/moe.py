"""The MoE step of an attention worker: torch on the model's side, the expert dispatcher on the other."""

from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from model.batch import MoeStep, PendingRows
from router.experts.dispatcher import ExpertDispatcher
from router.experts.pending import PendingDispatch
from wire.phases import Phase


class Experts(MoeStep, Protocol):
    """Routed experts as the engine uses them: with a mark between steps."""

    def begin_step(self, phase: Phase) -> None:
        """Called before each step, with what it is for; placement changes at no other time."""


class RemoteExperts:
    """Experts in other processes, behind the dispatcher."""

    is_elsewhere = True

    def __init__(self, dispatcher: ExpertDispatcher) -> None:
        self._dispatcher = dispatcher

    def begin_step(self, phase: Phase) -> None:
        """Puts the newest routing table in force."""
        self._dispatcher.adopt_table(phase)

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        """Sends the rows of one layer.

        Args:
            layer_idx: MoE layer.
            x_TD: (T, D) float32.
            ids_TK: (T, K) int32.
            weights_TK: (T, K) float32.
        """
        pending = self._dispatcher.start(
            layer_idx, _numbers_of(x_TD), _numbers_of(ids_TK), _numbers_of(weights_TK)
        )
        return _RemoteRows(pending, None if x_TD.is_cpu else x_TD.device)


def _numbers_of(x: Tensor) -> npt.NDArray[Any]:
    """A tensor in this process's memory; asked of one that is there, torch looks around for long."""
    return x.numpy() if x.is_cpu else x.cpu().numpy()


class _RemoteRows:
    def __init__(self, pending: PendingDispatch, device: torch.device | None) -> None:
        """Takes where the rows are wanted; None = where they come."""
        self._pending = pending
        self._device = device

    def result(self) -> Tensor:
        """(T, D) float32, waits for every worker."""
        rows_TD = torch.from_numpy(self._pending.result())
        return rows_TD if self._device is None else rows_TD.to(self._device)
