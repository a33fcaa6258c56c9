"""A small cluster in one process: expert and attention workers behind real gRPC, and a fake controller."""

import asyncio
import contextlib
import importlib.util
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import grpc.aio
import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.precision import Precision
from router.experts.table import Replica, build_table, table_to_proto
from tests.reference_data import checkpoint_dir
from wire.errors import from_rpc
from wire.frames import decode_frame
from wire.handshake import Handshake
from wire.phases import Phase
from wire.proto import (
    attention_pb2,
    attention_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
)
from wire.rpc import CHANNEL_OPTIONS, PREFILL_METHOD, SCORE_METHOD, SERVER_OPTIONS
from workers.attention.build import EngineConfig
from workers.attention.draft_record import DraftRecord
from workers.attention.drafter import Speculation
from workers.attention.server import AttentionServer, AttentionSettings
from workers.attention.speculation import DraftPolicy, DraftRules
from workers.config import AttentionConfig, ComputeConfig, DispatchConfig, KvConfig, MtpConfig
from workers.expert.server import ExpertServer, ExpertSettings

CacheDtype = Literal["float32", "bfloat16", "fp8"]
TEST_S = 60
HOST = "127.0.0.1"
PAGE_TOKENS = 4
ROLES = {
    "prefill": control_pb2.ROLE_PREFILL,
    "decode": control_pb2.ROLE_DECODE,
    "both": control_pb2.ROLE_BOTH,
}


HAS_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed: pip install -e '.[nixl]'")


class AlwaysDrafts(DraftPolicy):
    """As many drafts as there may be, in every step."""

    def plan_drafts(self, num_sequences: int) -> int:
        return self.max_drafts

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        return [num_drafts] * len(records)


def _always_draft(speculation: Speculation) -> Speculation:
    return replace(speculation, policy=AlwaysDrafts(DraftRules(max_drafts=speculation.policy.max_drafts)))


class FakeController(control_pb2_grpc.ControlServicer):
    """Sends the newest snapshot to every watcher."""

    def __init__(self) -> None:
        self.snapshot = control_pb2.ClusterSnapshot()
        self.reported: dict[str, int] = {}
        """Attention worker -> table that it said it uses."""
        self.troubles: dict[str, str] = {}
        """Attention worker -> why it takes no requests."""
        self._changed = asyncio.Event()

    async def start(self) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(self, self.server)
        self.address = f"{HOST}:{self.server.add_insecure_port(f'{HOST}:0')}"
        await self.server.start()

    def push(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        snapshot.version = self.snapshot.version + 1
        self.snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()

    async def Report(self, request: Any, context: Any) -> control_pb2.ReportResponse:
        self.reported[request.member_id] = request.table_version
        self.troubles[request.member_id] = request.trouble
        return control_pb2.ReportResponse()

    async def Watch(self, request: control_pb2.WatchRequest, context: Any) -> None:  # type: ignore[override]
        while True:
            changed = self._changed
            await context.write(self.snapshot)
            await changed.wait()


@dataclass
class Worker:
    """A running server and where it listens."""

    worker_id: str
    server: Any
    address: str
    slots: list[expert_pb2.SlotAssignment] = field(default_factory=list)


@dataclass
class Cluster:
    """What a test works with; `push` tells everyone who is there."""

    directory: Path
    controller: FakeController
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    experts: dict[str, Worker] = field(default_factory=dict)
    attention: dict[str, Worker] = field(default_factory=dict)
    table_version: int = 0
    deadline_s: float = 30.0
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)

    def __post_init__(self) -> None:
        self.config = Checkpoint.open(self.directory).config
        fingerprint = Checkpoint.open(self.directory).fingerprint()
        self.handshake = Handshake(model=fingerprint, page_tokens=PAGE_TOKENS)

    def channel(self, worker: Worker) -> grpc.aio.Channel:
        if worker.address not in self.channels:
            self.channels[worker.address] = grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS)
        return self.channels[worker.address]

    async def start_expert(self, worker_id: str, experts: Sequence[int], *, port: int = 0) -> Worker:
        """An expert worker that holds these experts of every layer."""
        settings = ExpertSettings(compute=self.compute, host=HOST)
        server = ExpertServer(worker_id, checkpoint_dir=self.directory, settings=settings)
        worker = Worker(worker_id, server, f"{HOST}:{await server.start(port)}")
        worker.slots = [
            expert_pb2.SlotAssignment(layer_idx=layer, slot_idx=i, expert_idx=expert)
            for layer in self.config.expert_layer_ids
            for i, expert in enumerate(experts)
        ]
        self.experts[worker_id] = worker
        await self.load(worker, worker.slots)
        return worker

    async def load(
        self,
        worker: Worker,
        slots: Sequence[expert_pb2.SlotAssignment],
        *,
        metadata: Any = None,
    ) -> expert_pb2.SlotReport:
        stub = expert_pb2_grpc.ExpertStub(self.channel(worker))
        request = expert_pb2.LoadSlotsRequest(table_version=self.table_version + 1, slots=slots)
        return await stub.LoadSlots(request, metadata=metadata or self.handshake.to_metadata())

    async def start_attention(
        self,
        worker_id: str,
        *,
        page_tokens: int = PAGE_TOKENS,
        num_drafts: int = 0,
        cache_dtype: CacheDtype = "float32",
        **group: Any,
    ) -> Worker:
        """An attention worker; with `num_drafts` it drafts so many tokens in every step.

        The other fields are of its group or of `kv`.
        """
        kv = {name: group.pop(name) for name in KvConfig.model_fields.keys() & group.keys()}
        values = {"num_pages": 256, "max_step_tokens": 32, "probe_s": 0, **group}
        engine = EngineConfig(
            group=AttentionConfig(**values),
            compute=self.compute,
            kv=KvConfig(page_tokens=page_tokens, dtype=cache_dtype, **kv),
            mtp=MtpConfig(max_drafts=num_drafts),
            change_speculation=_always_draft,
        )
        settings = AttentionSettings(
            engine=engine,
            dispatch=self.dispatch.model_copy(update={"deadline_s": self.deadline_s}),
            controller_address=self.controller.address,
            host=HOST,
        )
        server = AttentionServer(worker_id, checkpoint_dir=self.directory, settings=settings)
        worker = self.attention[worker_id] = Worker(worker_id, server, f"{HOST}:{await server.start()}")
        return worker

    async def push(self, worker_phases: Mapping[str, Phase] | None = None) -> None:
        """A table over the expert workers that are there, known to every attention worker when it returns."""
        self.table_version += 1
        names = list(self.experts)
        holders = {(slot.layer_idx, slot.expert_idx): [] for w in self.experts.values() for slot in w.slots}
        for idx, name in enumerate(names):
            for slot in self.experts[name].slots:
                holders[slot.layer_idx, slot.expert_idx].append((idx, slot.slot_idx))
        layers: dict[int, list[Replica]] = {layer: [] for layer in self.config.expert_layer_ids}
        for (layer, expert), held in holders.items():
            layers[layer] += [
                Replica(expert_idx=expert, worker_idx=worker, slot_idx=slot, share=1 / len(held))
                for worker, slot in held
            ]
        table = build_table(
            version=self.table_version,
            num_experts=self.config.n_routed_experts,
            worker_ids=names,
            layers=layers,
            worker_phases=worker_phases,
        )
        members = [self._member(w, control_pb2.ROLE_EXPERT) for w in self.experts.values()]
        members += [self._member(w, ROLES[w.worker_id.split("-")[0]]) for w in self.attention.values()]
        self.controller.push(
            control_pb2.ClusterSnapshot(members=members, table=table_to_proto(table), page_tokens=PAGE_TOKENS)
        )
        version = self.controller.snapshot.version
        for worker in self.attention.values():
            await until(lambda watch=worker.server._watch: (watch.snapshot or NONE).version == version)

    def _member(self, worker: Worker, role: int) -> control_pb2.Member:
        return control_pb2.Member(
            worker_id=worker.worker_id, role=role, address=worker.address, is_ready=True
        )

    def open_generate(self, prompt: Sequence[int], *, at: str = "decode-0", **fields: Any) -> Any:
        """An open Generate call; prefilled by `prefill-0` unless told otherwise."""
        timeout, metadata = fields.pop("timeout", None), fields.pop("metadata", self.handshake.to_metadata())
        prefill = fields.pop("prefill", "prefill-0" if "prefill-0" in self.attention else "")
        if prefill:
            fields["prefill_address"] = self.attention[prefill].address
        fields.setdefault("request_id", f"r{next(_NUMBERS)}")
        fields.setdefault("max_tokens", 8)
        request = attention_pb2.SequenceRequest(token_ids=prompt, **fields)
        stub = attention_pb2_grpc.AttentionStub(self.channel(self.attention[at]))
        return stub.Generate(request, timeout=timeout, metadata=metadata)

    async def generate(self, prompt: Sequence[int], **fields: Any) -> list[int]:
        """All tokens of one call."""
        return await drain(self.open_generate(prompt, **fields))

    async def frames(self, at: str, method: str, request: Any, *, metadata: Any = None) -> list[Any]:
        """Every frame that a raw call answers with."""
        call = self.channel(self.attention[at]).unary_stream(
            method, request_serializer=type(request).SerializeToString
        )
        try:
            answers = call(request, metadata=metadata or self.handshake.to_metadata())
            return [decode_frame(data) async for data in answers]
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def score(self, prompt: Sequence[int], *, at: str, chunk_tokens: int = 0) -> dict[str, Tensor]:
        request = attention_pb2.ScoreRequest(token_ids=prompt, chunk_tokens=chunk_tokens)
        frames = await self.frames(at, SCORE_METHOD, request)
        return {frame.meta.decode(): torch.from_numpy(np.array(frame.tensors[0])) for frame in frames}

    async def prefill(self, prompt: Sequence[int], *, at: str = "prefill-0", **kwargs: Any) -> list[Any]:
        request = attention_pb2.SequenceRequest(request_id="p", token_ids=prompt, max_tokens=4)
        return await self.frames(at, PREFILL_METHOD, request, **kwargs)

    def metric(self, worker_id: str, name: str, **labels: str) -> float:
        worker = self.attention.get(worker_id) or self.experts[worker_id]
        role = "attention" if worker_id in self.attention else "expert"
        return worker.server.metrics.registry.get_sample_value(f"moray_{role}_{name}", labels) or 0.0

    async def is_empty(self, *worker_ids: str) -> None:
        """All pages of the attention workers come back, by the accounts and by the metric."""
        for worker_id in worker_ids or tuple(self.attention):
            await until(lambda w=worker_id: self.metric(w, "pages", state="used") == 0)
            server = self.attention[worker_id].server
            if (stage := server._sender.stage) is not None:
                await until(lambda stage=stage: stage.num_lent == 0)
            await server.check_integrity()
            assert self.metric(worker_id, "integrity_errors_total") == 0

    async def stop(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        workers = [*self.attention.values(), *self.experts.values()]
        await asyncio.gather(*(worker.server.stop(grace_s=0) for worker in workers))
        await self.controller.server.stop(None)


NONE = control_pb2.ClusterSnapshot()
_NUMBERS = itertools.count()


async def drain(call: Any) -> list[int]:
    """The tokens of a call up to its end; its error as the class that the worker raised."""
    try:
        return [token async for event in call for token in event.token_ids]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


async def until(is_so: Callable[[], bool]) -> None:
    """Gives the loop turns until `is_so`, for what no event tells; the test's own limit ends it."""
    while not is_so():  # noqa: ASYNC110 - it looks into servers, which have no event for this
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def open_cluster(
    shape: str | Path = "default",
    *,
    num_experts: int = 2,
    attention: dict[str, dict[str, Any]] | None = None,
    deadline_s: float = 30.0,
    dtype: Precision = "auto",
    dispatch: DispatchConfig | None = None,
) -> AsyncIterator[Cluster]:
    """A ready cluster; at its end every page is free, and every port and thread is gone."""
    threads_before = set(threading.enumerate())
    controller = FakeController()
    await controller.start()
    directory = shape if isinstance(shape, Path) else checkpoint_dir(shape)
    compute = ComputeConfig(dtype=dtype)
    cluster = Cluster(
        directory,
        controller,
        deadline_s=deadline_s,
        compute=compute,
        dispatch=dispatch or DispatchConfig(),
    )
    try:
        everyone = range(cluster.config.n_routed_experts)
        for i in range(num_experts):
            await cluster.start_expert(f"expert-{i}", everyone[i::num_experts])
        for name, group in (attention or {"prefill-0": {}, "decode-0": {}}).items():
            await cluster.start_attention(name, **group)
        await cluster.push()
        yield cluster
        await cluster.is_empty()
    finally:
        await cluster.stop()
    await until(lambda: not _left(threads_before))


def _left(before: set[threading.Thread]) -> list[str]:
    """Our threads that outlived the servers; the libraries keep pools of their own."""
    ours = ("engine", "experts", "loading", "nixl")
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith(ours)]


def run_test(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test on a loop of its own; no task may outlive it."""

    async def guarded() -> None:
        await asyncio.wait_for(main, TEST_S)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:
            _, pending = await asyncio.wait(left, timeout=2)
            assert not pending

    asyncio.run(guarded())
