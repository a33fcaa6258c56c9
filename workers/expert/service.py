"""Forward: rows of activations in, partial sums out; a pure function of its frame and the weights held."""

import logging
import time
from collections import Counter

import numpy as np
import torch

from model.kernels.base import Assignments, Kernels
from wire.errors import ExpertNotLoaded, FrameInvalid, InternalError, MorayError
from wire.frames import Array, Frame, FrameKind
from wire.metrics import Metrics
from workers.expert.load import LoadCounters
from workers.expert.slots import SlotStore

_log = logging.getLogger(__name__)


class ExpertService:
    """Answers FORWARD frames; called by one thread."""

    def __init__(
        self,
        store: SlotStore,
        kernels: Kernels,
        *,
        hidden_size: int,
        metrics: Metrics,
        device: torch.device | str = "cpu",
    ) -> None:
        self._store = store
        self._kernels = kernels
        self._hidden_size = hidden_size
        self._metrics = metrics
        self._device = device
        self.load = LoadCounters()
        """Rows since the controller's last heartbeat."""
        self._rows_by_expert: Counter[tuple[int, int]] = Counter()
        self._num_rows = 0
        self._most_rows = 0

    def answer(self, frame: Frame) -> Frame:
        """The PARTIAL frame of a FORWARD frame, or an ERROR frame that names what is wrong with it."""
        try:
            partial_RD = self._forward(frame)
            result = "ok"
            reply = Frame(
                kind=FrameKind.PARTIAL,
                tensors=(partial_RD,),
                call_id=frame.call_id,
                table_version=frame.table_version,
                layer_idx=frame.layer_idx,
            )
        except MorayError as error:
            result = type(error).__name__
            reply = _error_frame(frame, error)
        except Exception as error:  # noqa: BLE001  the stream carries others' calls: mapped and logged
            _log.exception("Forward of layer %d failed", frame.layer_idx)
            result = InternalError.__name__
            reply = _error_frame(frame, InternalError(f"Forward: {type(error).__name__}: {error}"))
        self._metrics.counter("calls_total", result=result).inc()
        return reply

    def _forward(self, frame: Frame) -> Array:
        x_RD, row_idx_A, expert_idx_A, weight_A = self._check(frame)
        experts = self._store.experts_of(frame.layer_idx)
        wanted = np.unique(expert_idx_A).tolist()
        missing = [expert for expert in wanted if expert not in experts]
        if missing:
            raise ExpertNotLoaded(
                f"layer {frame.layer_idx}: experts {missing} are not in a slot of this worker"
            )
        began_s = time.perf_counter()
        assignments = Assignments(
            row_idx_A=self._tensor(row_idx_A),
            expert_idx_A=self._tensor(expert_idx_A),
            weights_A=self._tensor(weight_A),
        )
        partial_RD: Array = self._kernels.expert_sums(self._tensor(x_RD), assignments, experts).cpu().numpy()
        self._metrics.histogram("forward_seconds").observe(time.perf_counter() - began_s)
        self._count(frame.layer_idx, expert_idx_A)
        return partial_RD

    def _check(self, frame: Frame) -> tuple[Array, ...]:
        """The four tensors of a FORWARD frame, refused unless every shape, dtype and index fits."""
        dtypes = tuple(tensor.dtype.name for tensor in frame.tensors)
        if frame.kind is not FrameKind.FORWARD or dtypes != ("float32", "int32", "int32", "float32"):
            raise FrameInvalid(
                f"wanted FORWARD with rows, row_idx, expert_idx, weights; got {frame.kind.name} {dtypes}"
            )
        x_RD, row_idx_A, expert_idx_A, weight_A = frame.tensors
        if x_RD.ndim != 2 or x_RD.shape[1] != self._hidden_size:
            raise FrameInvalid(f"rows have shape {x_RD.shape}; wanted (R, {self._hidden_size})")
        if not row_idx_A.shape == expert_idx_A.shape == weight_A.shape or row_idx_A.ndim != 1:
            raise FrameInvalid(
                f"assignments have shapes {row_idx_A.shape}, {expert_idx_A.shape}, {weight_A.shape}"
            )
        if row_idx_A.size and (row_idx_A.min() < 0 or row_idx_A.max() >= x_RD.shape[0]):
            raise FrameInvalid(f"an assignment names a row outside [0, {x_RD.shape[0]})")
        return frame.tensors

    def _tensor(self, array: Array) -> torch.Tensor:
        # The copy is needed: the array is a read-only view of the received bytes.
        return torch.from_numpy(array.copy()).to(self._device)

    def _count(self, layer_idx: int, expert_idx_A: Array) -> None:
        self.load.count(layer_idx, expert_idx_A)
        experts, counts = np.unique(expert_idx_A, return_counts=True)
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            self._rows_by_expert[layer_idx, expert] += count
            self._most_rows = max(self._most_rows, self._rows_by_expert[layer_idx, expert])
        self._num_rows += int(expert_idx_A.size)
        self._metrics.counter("rows_total").inc(int(expert_idx_A.size))
        num_held = max(1, len(self._store.slots()))
        self._metrics.gauge("load_max_over_mean").set(self._most_rows * num_held / max(1, self._num_rows))


def _error_frame(frame: Frame, error: MorayError) -> Frame:
    meta = f"{type(error).__name__}: {error.message}".encode()
    return Frame(kind=FrameKind.ERROR, call_id=frame.call_id, layer_idx=frame.layer_idx, meta=meta)
