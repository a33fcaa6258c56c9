"""Forward: rows of activations in, partial sums out; a pure function of its frame and the weights held."""

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.errors import ModelError
from model.kernels.base import Assignments, Kernels
from model.matrix import Mlp
from router.experts.payload import ForwardRows, encode_sums, read_forward
from wire.errors import ExpertNotLoaded, InternalError, ModelBroken, MorayError
from wire.frames import FLAG_LOAD_MISSING, FLAG_PREFILL, Array, Frame, FrameKind
from wire.metrics import Metrics
from wire.phases import PHASES, Phase
from workers.expert.load import LoadCounters
from workers.expert.slots import SlotStore
from workers.expert.types import Reply

_log = logging.getLogger(__name__)


class _Call(NamedTuple):
    """One frame among those that are answered together."""

    idx: int
    """Its place among them."""
    frame: Frame
    rows: ForwardRows
    experts: Mapping[int, Mlp]


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
        self._device = None if device == "cpu" else device
        """None = where the frames are; asked of that, torch looks around for long."""
        self.load = LoadCounters()
        """Rows since the controller's last heartbeat."""
        # Looked up once: they are counted in every call.
        self._forward_seconds = metrics.histogram("forward_seconds")
        self._batch_calls = metrics.histogram("batch_calls")
        self._answered = metrics.counter("calls_total", result="ok")
        self._rows = {phase: metrics.counter("rows_total", phase=phase) for phase in PHASES}

    def answer(self, frame: Frame) -> Frame:
        """The PARTIAL frame of a FORWARD frame, or an ERROR frame that names what is wrong with it."""
        answers: list[Frame] = []
        self.answer_all([frame], lambda _, answer: answers.append(answer))
        return answers[0]

    def answer_all(self, frames: Sequence[Frame], reply: Reply) -> None:
        """Answers several frames; those of one layer are computed together.

        The kernels give a row the same bits whatever rows are beside it, so company changes no answer.

        Args:
            frames: FORWARD.
            reply: gets a frame's index and its answer, before metrics are: callers wait for it.
        """
        by_layer: dict[int, list[_Call]] = {}
        for idx, frame in enumerate(frames):
            try:
                call = self._read(idx, frame)
            except MorayError as error:
                reply(idx, self._refuse(frame, error))
            except Exception as error:  # noqa: BLE001  one bad call must not take the others': mapped and logged
                reply(idx, self._refuse(frame, _unexpected(frame.layer_idx, error)))
            else:
                by_layer.setdefault(frame.layer_idx, []).append(call)
        for calls in by_layer.values():
            self._compute(calls, reply)

    def _read(self, idx: int, frame: Frame) -> "_Call":
        """A frame that was checked, with the experts that it names."""
        rows = read_forward(frame, hidden_size=self._hidden_size)
        experts = self._store.experts_of(frame.layer_idx)
        wanted = set(rows.expert_idx_A.tolist())
        if not experts.keys() >= wanted:
            missing = sorted(wanted - experts.keys())
            if not frame.flags & FLAG_LOAD_MISSING:
                raise ExpertNotLoaded(
                    f"layer {frame.layer_idx}: experts {missing} are not in a slot of this worker"
                )
            experts = {**experts, **self._load(frame.layer_idx, missing)}
        return _Call(idx=idx, frame=frame, rows=rows, experts=experts)

    def _load(self, layer_idx: int, expert_ids: list[int]) -> Mapping[int, Mlp]:
        """Experts of no slot, which the caller finds nowhere else."""
        try:
            return self._store.load_missing(layer_idx, expert_ids)
        except ModelError as error:
            raise ModelBroken(str(error)) from error

    def _compute(self, calls: "Sequence[_Call]", reply: Reply) -> None:
        """Answers calls of one layer."""
        layer_idx = calls[0].frame.layer_idx
        began_s = time.perf_counter()
        try:
            sums_RD = self._sums(calls)
        except Exception as error:  # noqa: BLE001  the stream carries others' calls: mapped and logged
            fault = _unexpected(layer_idx, error)
            for call in calls:
                reply(call.idx, self._refuse(call.frame, fault))
            return
        ended_s = time.perf_counter()
        # An answer may come to lie where its call is.
        computed = [(call.frame.flags, call.rows.expert_idx_A.copy()) for call in calls]
        begin = 0
        for call in calls:
            end = begin + len(call.rows.x_RD)
            reply(call.idx, _partial_frame(call.frame, sums_RD[begin:end]))
            begin = end
        self._forward_seconds.observe(ended_s - began_s)
        self._batch_calls.observe(len(calls))
        self._answered.inc(len(calls))
        for flags, expert_idx_A in computed:
            phase: Phase = "prefill" if flags & FLAG_PREFILL else "decode"
            self.load.count(phase, layer_idx, expert_idx_A)
            self._rows[phase].inc(expert_idx_A.size)

    def _sums(self, calls: "Sequence[_Call]") -> npt.NDArray[np.float64]:
        """(R, D) sums of all calls, one behind another: one call of the kernel."""
        rows, experts = calls[0].rows, calls[0].experts
        if len(calls) > 1:
            rows = _one_behind_another([call.rows for call in calls])
            if any(call.experts is not experts for call in calls):
                experts = {expert: mlp for call in calls for expert, mlp in call.experts.items()}
        assignments = Assignments(
            row_idx_A=self._tensor(rows.row_idx_A),
            expert_idx_A=self._tensor(rows.expert_idx_A),
            weights_A=self._tensor(rows.weight_A),
        )
        sums_RD = self._kernels.expert_sums(self._tensor(rows.x_RD), assignments, experts)
        sums: npt.NDArray[np.float64] = (sums_RD if self._device is None else sums_RD.cpu()).numpy()
        return sums

    def _refuse(self, frame: Frame, error: MorayError) -> Frame:
        self._metrics.counter("calls_total", result=type(error).__name__).inc()
        meta = f"{type(error).__name__}: {error.message}".encode()
        return Frame(kind=FrameKind.ERROR, call_id=frame.call_id, layer_idx=frame.layer_idx, meta=meta)

    def _tensor(self, array: Array) -> torch.Tensor:
        # torch takes no read-only array, and views of received bytes may be.
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor if self._device is None else tensor.to(self._device)


def _one_behind_another(calls: Sequence[ForwardRows]) -> ForwardRows:
    starts = accumulate((len(rows.x_RD) for rows in calls[:-1]), initial=0)
    return ForwardRows(
        x_RD=np.concatenate([rows.x_RD for rows in calls]),
        row_idx_A=np.concatenate([r.row_idx_A + start for r, start in zip(calls, starts, strict=True)]),
        expert_idx_A=np.concatenate([rows.expert_idx_A for rows in calls]),
        weight_A=np.concatenate([rows.weight_A for rows in calls]),
    )


def _unexpected(layer_idx: int, error: Exception) -> InternalError:
    _log.error("Forward of layer %d failed", layer_idx, exc_info=error)
    return InternalError(f"Forward: {type(error).__name__}: {error}")


def _partial_frame(frame: Frame, sums_RD: npt.NDArray[np.float64]) -> Frame:
    return Frame(
        kind=FrameKind.PARTIAL,
        tensors=(encode_sums(sums_RD, frame.flags),),
        call_id=frame.call_id,
        table_version=frame.table_version,
        layer_idx=frame.layer_idx,
    )
