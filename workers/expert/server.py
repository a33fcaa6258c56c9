"""The gRPC server of an expert worker: a shell around SlotStore and ExpertService."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import grpc.aio

from model.errors import ModelError
from model.matrix import Mlp
from model.weights import load_experts
from router.experts.torch_links import Backend
from wire.errors import InvalidRequest, ModelBroken
from wire.handshake import Handshake, check_handshake
from wire.metrics import Metrics
from wire.proto import expert_pb2, expert_pb2_grpc
from wire.rpc import SERVER_OPTIONS, Context, unary_errors
from workers.checkpoint import open_checkpoint
from workers.config import ComputeConfig, ExpertConfig
from workers.expert.call_queue import CallQueue
from workers.expert.forward_stream import ForwardStream
from workers.expert.load import Ints, RecentLoad, summarise
from workers.expert.local_server import LocalServer
from workers.expert.service import ExpertService
from workers.expert.slots import SlotStore
from workers.expert.threads import ComputeThreads
from workers.expert.torch_server import TorchServer
from workers.expert.types import Place, Slot, slots_from_proto, slots_to_proto
from workers.packing import make_packing
from workers.progress import log_progress

_log = logging.getLogger(__name__)

_LOAD_HALF_LIFE_S = 30.0
"""Of the rows behind the load metrics."""
_NUM_TOP = 8
"""Busiest experts that metrics show, by rank."""


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """What an expert worker is told at start."""

    group: ExpertConfig = field(default_factory=ExpertConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    host: str
    """Address to listen on and to be reached at."""


class ExpertServer(expert_pb2_grpc.ExpertServicer):
    """One expert worker: loads what it is told to and answers Forward.

    The network loop never computes or loads. Calls over gRPC are computed by the queue's thread, those of the
    same host by the thread that reads them, if the arithmetic takes one: threads keep helpers of their own.
    """

    def __init__(self, worker_id: str, *, checkpoint_dir: Path, settings: ExpertSettings) -> None:
        """Opens the checkpoint (headers only).

        Raises:
            ModelBroken: the checkpoint cannot be served; names the file or tensor.
        """
        self._worker_id = worker_id
        self._host = settings.host
        self._packing = make_packing(settings.group, settings.compute)
        self._checkpoint = open_checkpoint(checkpoint_dir)
        self.metrics = Metrics("expert")
        self._store = SlotStore(
            self._load_experts,
            gather_experts=self._packing.kernels.gather_experts,
            max_on_demand=settings.group.on_demand_experts,
        )
        self._recent_load = RecentLoad(half_life_s=_LOAD_HALF_LIFE_S)
        self._expert_bytes = 0
        """Mean of the experts held; written when slots are loaded."""
        self._scale = expert_pb2.Scale()
        """The controller's; kept for the next one."""
        self._service = ExpertService(
            self._store,
            self._packing.kernels,
            hidden_size=self._checkpoint.config.hidden_size,
            metrics=self.metrics,
            device=self._packing.device,
        )
        self._handshake = Handshake(model=self._checkpoint.fingerprint())
        self._threads = ComputeThreads(
            worker_id, num_threads=settings.group.num_threads, is_bound=settings.group.bind_threads
        )
        self._queue = CallQueue(
            self._service.answer_all,
            start=self._packing.kernels.start,
            metrics=self.metrics,
            on_thread=self._threads.enter,
        )
        self._readers_compute = settings.group.num_threads == 1
        self._local: LocalServer | None = None
        self._pairs = TorchServer(partial(self._queue.submit, may_compute=self._readers_compute))
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> int:
        """Listens; returns the port."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        expert_pb2_grpc.add_ExpertServicer_to_server(self, server)
        frames = ForwardStream(self._handshake, partial(self._queue.submit, may_compute=False))
        server.add_generic_rpc_handlers((frames.handler(),))
        bound_port = server.add_insecure_port(f"{self._host}:{port}")
        await server.start()
        self._server = server
        self._local = self._listen_local(f"{self._host}:{bound_port}")
        return bound_port

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ends open streams and frees the port."""
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._local is not None:
            await asyncio.to_thread(self._local.close)
        await asyncio.to_thread(self._pairs.close)
        self._queue.close()
        self._threads.close()
        self._loading.shutdown(wait=True, cancel_futures=True)

    @unary_errors
    async def LoadSlots(
        self, request: expert_pb2.LoadSlotsRequest, context: Context
    ) -> expert_pb2.SlotReport:
        """Loads the experts named; answers when all are in memory."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        slots = slots_from_proto(request.slots)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loading, self._prepare, slots, request.table_version)
        return self._report()

    @unary_errors
    async def Describe(self, request: expert_pb2.DescribeRequest, context: Context) -> expert_pb2.SlotReport:
        """What the worker holds now."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        return self._report()

    @unary_errors
    async def Beat(self, request: expert_pb2.BeatRequest, context: Context) -> expert_pb2.BeatReport:
        """Says that it lives, and what it has computed since the last beat."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        self._scale = request.scale
        rows = self._service.load.drain()
        self._export_load(rows.values())
        report = expert_pb2.BeatReport(worker_id=self._worker_id, expert_bytes=self._expert_bytes)
        for phase, rows_by_layer in rows.items():
            for layer_idx, rows_E in rows_by_layer.items():
                experts = rows_E.nonzero()[0]
                report.rows.add(
                    layer_idx=layer_idx,
                    expert_idx=experts,
                    num_rows=rows_E[experts],
                    is_prefill=phase == "prefill",
                )
        return report

    @unary_errors
    async def JoinPair(
        self, request: expert_pb2.JoinPairRequest, context: Context
    ) -> expert_pb2.JoinPairReply:
        """Begins to form a group of torch.distributed with the caller."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        if request.backend not in ("gloo", "nccl"):
            raise InvalidRequest(f"backend {request.backend!r}; wanted gloo or nccl", field="backend")
        port = await asyncio.to_thread(self._pairs.join, cast(Backend, request.backend))
        return expert_pb2.JoinPairReply(store_port=port)

    def _export_load(self, rows: Iterable[Mapping[int, Ints]]) -> None:
        now_s = time.monotonic()
        for rows_by_layer in rows:
            self._recent_load.fold(rows_by_layer, now_s=now_s)
        recent = self._recent_load.rows_of({slot.place for slot in self._store.slots()})
        summary = summarise(recent, num_top=_NUM_TOP)
        self.metrics.gauge("load_balance_ratio").set(summary.balance)
        self.metrics.gauge("load_gini_ratio").set(summary.gini)
        for rank, num_rows in enumerate(summary.top_rows, start=1):
            self.metrics.gauge("top_expert_rows", rank=str(rank)).set(num_rows)

    def _listen_local(self, address: str) -> LocalServer | None:
        submit = partial(self._queue.submit, may_compute=self._readers_compute)
        try:
            return LocalServer(
                address, handshake=self._handshake, submit=submit, on_thread=self._threads.enter
            )
        except OSError as error:
            _log.warning("%s takes no calls through shared memory: %s", self._worker_id, error)
            return None

    def _prepare(self, slots: list[Slot], table_version: int) -> None:
        try:
            self._store.prepare(slots, table_version=table_version)
        except ModelError as error:
            raise ModelBroken(str(error)) from error
        except ValueError as error:
            raise InvalidRequest(str(error), field="slots") from error
        self._store.check_integrity()
        self.metrics.gauge("slots").set(len(slots))
        num_bytes = self._store.num_bytes()
        self._expert_bytes = num_bytes // max(1, len(slots))
        self.metrics.gauge("weights_bytes").set(num_bytes)
        _log.info("%s holds %d slots for table %d", self._worker_id, len(slots), table_version)

    def _load_experts(self, wanted: Sequence[Place]) -> Iterable[tuple[Place, Mlp]]:
        on_progress = log_progress(_log, f"experts of {self._worker_id}")
        return load_experts(self._checkpoint, self._packing, wanted, on_progress=on_progress)

    def _report(self) -> expert_pb2.SlotReport:
        return expert_pb2.SlotReport(
            worker_id=self._worker_id,
            table_version=self._store.table_version,
            slots=slots_to_proto(self._store.slots()),
            weight_bytes=self._store.num_bytes(),
            scale=self._scale,
        )
