"""A controller over real gRPC with fake processes: expert workers without weights, readers of tables."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from cluster.actors import StartReport
from cluster.config import MorayConfig
from cluster.control.members import MemberState
from cluster.controller import Controller
from cluster.placement import ExpertShape
from cluster.state import ClusterState
from cluster.topology.types import NodeTopology
from router.experts.table import table_from_proto
from wire.errors import InvalidRequest, NotReady, WorkerLost
from wire.metrics import Metrics
from wire.proto import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS

HOST = "127.0.0.1"
SHAPE = ExpertShape(num_experts=6, layer_ids=(1, 2))
NODE = NodeTopology(node_id="n", address=HOST, host="h", zone="z", rack="r", accelerator="")


class FakeExpert(expert_pb2_grpc.ExpertServicer):
    """An expert worker without weights: it holds what it is told to."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.slots: list[expert_pb2.SlotAssignment] = []
        self.table_version = 0
        self.scale = expert_pb2.Scale()
        self.num_loads = 0
        self.is_silent = False
        """As after SIGSTOP: connections stay, nothing is answered."""
        self.refuses_new = False
        """Loads fail that would bring an expert which is not held."""
        self.busy_experts: list[int] = []
        """Experts that get rows between two heartbeats."""
        self.busy_phases = ["decode"]
        """What those rows are for."""

    @property
    def places(self) -> set[tuple[int, int]]:
        return {(slot.layer_idx, slot.expert_idx) for slot in self.slots}

    async def start(self) -> str:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        expert_pb2_grpc.add_ExpertServicer_to_server(self, self.server)
        port = self.server.add_insecure_port(f"{HOST}:0")
        await self.server.start()
        return f"{HOST}:{port}"

    async def LoadSlots(self, request: Any, context: Any) -> expert_pb2.SlotReport:
        await self._answer()
        wanted = {(slot.layer_idx, slot.expert_idx) for slot in request.slots}
        assert len({(slot.layer_idx, slot.slot_idx) for slot in request.slots}) == len(request.slots)
        if self.refuses_new and wanted - self.places:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "disk gone", (("moray-error", "ModelBroken"),)
            )
        self.slots = list(request.slots)
        self.table_version = request.table_version
        self.num_loads += 1
        return self._report()

    async def Describe(self, request: Any, context: Any) -> expert_pb2.SlotReport:
        await self._answer()
        return self._report()

    async def Beat(self, request: Any, context: Any) -> expert_pb2.BeatReport:
        await self._answer()
        self.scale = request.scale
        rows = [
            expert_pb2.LayerRows(
                layer_idx=layer_idx,
                expert_idx=self.busy_experts,
                num_rows=[100] * len(self.busy_experts),
                is_prefill=phase == "prefill",
            )
            for layer_idx in SHAPE.layer_ids
            for phase in self.busy_phases
        ]
        return expert_pb2.BeatReport(worker_id=self.worker_id, rows=rows, expert_bytes=10)

    async def _answer(self) -> None:
        while self.is_silent:  # noqa: ASYNC110 - stopped processes have no events
            await asyncio.sleep(0.01)

    def _report(self) -> expert_pb2.SlotReport:
        return expert_pb2.SlotReport(
            worker_id=self.worker_id, table_version=self.table_version, slots=self.slots, scale=self.scale
        )


class Reader:
    """An attention worker's side of the control plane: follows tables and says which one it uses."""

    def __init__(self, worker_id: str, controller_address: str) -> None:
        self.worker_id = worker_id
        self.version = 0
        self.reports = True
        """Whether it says what it uses."""
        self._channel = grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        stub = control_pb2_grpc.ControlStub(self._channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for snapshot in stub.Watch(
                    control_pb2.WatchRequest(member_id=self.worker_id), wait_for_ready=True
                ):
                    self.version = snapshot.table.version
                    if self.reports:
                        report = control_pb2.ReportRequest(
                            member_id=self.worker_id, table_version=self.version
                        )
                        await stub.Report(report)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()


@dataclass
class FakeLauncher:
    """Ray's part: processes by worker id, which outlive a controller."""

    controller_address: str = ""
    experts: dict[str, FakeExpert] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    num_starts: Counter[str] = field(default_factory=Counter)
    room: int = 99
    """Processes that find a node."""
    silent_ids: set[str] = field(default_factory=set)
    cordoned: list[str] = field(default_factory=list)
    """Ids of nodes."""
    draining: list[str] = field(default_factory=list)
    """Nodes that Ray drains."""
    is_stopping_slowly: bool = False
    """Whether who is told to stop goes on for ever."""
    _ends: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    _reports: dict[str, StartReport] = field(default_factory=dict)

    async def launch(self, worker_id: str, role: str) -> tuple[StartReport, NodeTopology]:
        if worker_id not in self._reports:
            if len(self._reports) >= self.room:
                raise NotReady("none of 1 nodes has room left")
            self.num_starts[worker_id] += 1
            address = f"{HOST}:1"
            if role == "expert":
                self.experts[worker_id] = FakeExpert(worker_id)
                address = await self.experts[worker_id].start()
            else:
                self.readers[worker_id] = Reader(worker_id, self.controller_address)
            self._ends[worker_id] = asyncio.get_running_loop().create_future()
            self._reports[worker_id] = StartReport(
                address=address, metrics_address="", node_id="n", pid=1, started_s=self.num_starts[worker_id]
            )
        return self._reports[worker_id], NODE

    async def cordon(self, node: str) -> set[str]:
        if node not in (NODE.node_id, NODE.host, NODE.address):
            raise InvalidRequest(f"node: got {node}", field="node")
        self.cordoned.append(NODE.node_id)
        return {NODE.node_id}

    def recall_cordons(self, node_ids: Iterable[str]) -> None:
        self.cordoned.extend(node_ids)

    async def draining_nodes(self) -> set[str]:
        return set(self.draining)

    def running(self) -> list[str]:
        return sorted(self._reports)

    async def wait_lost(self, worker_id: str) -> None:
        await asyncio.shield(self._ends[worker_id])

    async def kill(self, worker_id: str) -> None:
        await self.die(worker_id)

    async def stop(self, worker_id: str, *, grace_s: float) -> None:
        if self.is_stopping_slowly:
            await asyncio.Event().wait()
        await self.die(worker_id)

    async def die(self, worker_id: str) -> None:
        """A process ends, whoever wanted it."""
        if self._reports.pop(worker_id, None) is None:
            return
        end = self._ends.pop(worker_id)
        if not end.done():
            end.set_exception(WorkerLost(f"{worker_id}: gone"))
            end.exception()
        if expert := self.experts.pop(worker_id, None):
            await expert.server.stop(None)
        if reader := self.readers.pop(worker_id, None):
            await reader.stop()


class Lab:
    """A running controller, its processes, and a watcher that checks every table it is sent."""

    def __init__(self, launcher: FakeLauncher, values: dict[str, Any]) -> None:
        timing = {
            "heartbeat_s": 0.05,
            "heartbeat_misses": 4,
            "restart_delay_s": 0.02,
            "reader_lease_s": 0.6,
            "report_misses": 1000,
        }
        self.config = MorayConfig.from_mapping(
            {"prefill": {"replicas": 0}}
            | values
            | {"balance": {"enabled": False, "pause_s": 0} | values.get("balance", {})}
            | {"controller": timing | values.get("controller", {})}
        )
        self.launcher = launcher
        self.metrics = Metrics("controller")
        self.tables: list[control_pb2.RoutingTable] = []
        self.problems: list[str] = []
        roles = {"expert": self.config.expert.replicas, "decode": self.config.decode.replicas}
        members = [
            MemberState(worker_id=f"{role}-{idx}", role=role)
            for role, num in roles.items()
            for idx in range(num)
        ]
        self.state = ClusterState(
            members,
            model=control_pb2.ModelInfo(name="fake"),
            shape=SHAPE,
            num_slots=self.config.expert.num_slots,
            page_tokens=4,
        )
        self.controller = Controller(
            self.config,
            state=self.state,
            launcher=launcher,  # type: ignore[arg-type]  # a fake with the same methods
            fingerprint="f",
            metrics=self.metrics,
        )

    async def start(self, address: str) -> None:
        self.launcher.controller_address = address
        self._running = asyncio.create_task(self.controller.run(address))
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = control_pb2_grpc.ControlStub(self._channel)
        self._watching = asyncio.create_task(self._watch())

    async def crash(self) -> None:
        """The controller's process ends; its workers live on."""
        await self._stop_watching()
        tasks = [*self.controller._tasks.values(), self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.controller._rollout.close()
        await self.controller._server.stop()

    async def stop(self) -> None:
        await self._stop_watching()
        await self.controller.shutdown()
        await self._running

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            assert not self.problems, self.problems
            await asyncio.sleep(0.005)

    def is_whole(self) -> bool:
        """Every member works, and nothing is being loaded or freed."""
        return not self.state.waiting_for() and self.is_quiet()

    def is_quiet(self) -> bool:
        """What is held is what the placement says, no more and no less."""
        placement = self.state.tables.placement or {}
        held = {worker_id: expert.places for worker_id, expert in self.launcher.experts.items()}
        return bool(placement) and held == {worker_id: set(places) for worker_id, places in placement.items()}

    def table_workers(self) -> list[str]:
        return list(self.tables[-1].worker_ids) if self.tables else []

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"moray_controller_{name}", labels) or 0.0

    async def _stop_watching(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close()

    async def _watch(self) -> None:
        stub = control_pb2_grpc.ControlStub(self._channel)
        async for snapshot in stub.Watch(control_pb2.WatchRequest(member_id="lab"), wait_for_ready=True):
            if snapshot.HasField("table") and (not self.tables or self.tables[-1] != snapshot.table):
                self._check(snapshot.table)
                self.tables.append(snapshot.table)

    def _check(self, message: control_pb2.RoutingTable) -> None:
        """Every table is whole, newer, and names what is held, but for processes that died since."""
        table = table_from_proto(message)
        if self.tables and message.version <= self.tables[-1].version:
            self.problems.append(f"table {message.version} after {self.tables[-1].version}")
        for layer_idx, routes in table.layers.items():
            for replica in routes.replicas:
                expert = self.launcher.experts.get(table.worker_ids[replica.worker_idx])
                if (
                    expert is not None
                    and expert.num_loads
                    and (layer_idx, replica.expert_idx) not in expert.places
                ):
                    self.problems.append(f"table {message.version}: {expert.worker_id} lacks {replica}")


@contextlib.asynccontextmanager
async def running(
    values: dict[str, Any] | None = None, *, launcher: FakeLauncher | None = None, address: str = ""
) -> AsyncIterator[Lab]:
    """A controller, until it has its members; shuts down what is left of it."""
    lab = Lab(launcher or FakeLauncher(), values or {})
    await lab.start(address or f"{HOST}:{free_port()}")
    try:
        yield lab
    finally:
        if not lab._running.done():
            await lab.stop()
    assert not lab.problems, lab.problems


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
