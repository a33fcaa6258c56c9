"""The controller: brings every member to life and keeps it there, places experts, publishes snapshots.

One task supervises each member: launch, prepare (expert workers load their slots), activate (publish), wait
until it is lost, and again. It stores nothing: a restarted controller finds its actors by name, and each of
them answers `start` with what it is already.
"""

import asyncio
import contextlib
import logging

import grpc.aio

from cluster.config import MorayConfig
from cluster.control_server import ControlServer
from cluster.launcher import Launcher
from cluster.state import ClusterState, MemberState
from wire.errors import ClientError, ModelBroken, MorayError, WorkerLost, from_rpc
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import expert_pb2, expert_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS

_log = logging.getLogger(__name__)


class Controller:
    """Supervises the members of one cluster; everything runs on the loop that calls `run`."""

    def __init__(
        self,
        config: MorayConfig,
        *,
        state: ClusterState,
        launcher: Launcher,
        fingerprint: str,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._state = state
        self._launcher = launcher
        self._handshake = Handshake(model=fingerprint)
        self._metrics = metrics
        self._server = ControlServer(on_shutdown=self.shutdown, metrics=metrics)
        self._placed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._unheard: set[str] = set()
        """Workers of an earlier controller that have not reported to this one yet."""
        self.fatal: MorayError | None = None
        """An error that no restart mends; the cluster does not come up."""
        self.stopped = asyncio.Event()

    @property
    def state(self) -> ClusterState:
        """What the controller knows."""
        return self._state

    async def run(self, address: str) -> None:
        """Serves at host:port and supervises until `shutdown`."""
        await self._server.start(address)
        supervised = [member for member in self._state.members() if member.role != "controller"]
        # After a restart nothing is said until everyone who runs has reported: to the watchers of the last
        # snapshot a half-known cluster would look like one whose workers are gone.
        self._unheard = set(self._launcher.running([member.worker_id for member in supervised]))
        await self._publish()
        self._tasks = [
            asyncio.create_task(self._supervise(member.worker_id, member.role), name=member.worker_id)
            for member in supervised
        ]
        await self.stopped.wait()
        # The answer to the Shutdown call is still on its way.
        await self._server.stop()

    async def shutdown(self) -> None:
        """Ends the router (draining), then every worker; returns when they are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        members = [member for member in self._state.members() if member.role != "controller"]
        routers = [m.worker_id for m in members if m.role == "router"]
        workers = [m.worker_id for m in members if m.role != "router"]
        grace_s = self._config.router.drain_s + 5
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=grace_s) for worker_id in routers))
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=5) for worker_id in workers))
        self.stopped.set()

    async def _supervise(self, worker_id: str, role: str) -> None:
        while True:
            problem = "stopped by itself"
            try:
                await asyncio.wait_for(self._bring_up(worker_id, role), self._config.controller.start_s)
                _log.info("%s is ready", worker_id)
                await self._launcher.wait_lost(worker_id)
            except TimeoutError:
                problem = f"not up within controller.start_s={self._config.controller.start_s:g} s"
            except MorayError as error:
                problem = error.message
                if isinstance(error, ModelBroken | ClientError):
                    self.fatal = error
            except Exception as error:  # noqa: BLE001 - must outlive what it supervises; logged and shown
                _log.exception("supervising %s", worker_id)
                problem = f"{type(error).__name__}: {error}"
            await self._lose(worker_id, role, problem)
            await asyncio.sleep(self._config.controller.restart_delay_s)

    async def _bring_up(self, worker_id: str, role: str) -> None:
        report, node = await self._launcher.launch(worker_id, role)
        self._state.on_started(
            MemberState(
                worker_id=worker_id,
                role=role,
                address=report.address,
                metrics_address=report.metrics_address,
                node=node,
                incarnation=report.started_s,
                num_pages=report.num_pages,
            )
        )
        if role == "expert":
            await self._prepare(worker_id, report.address)
        self._state.on_ready(worker_id)
        self._unheard.discard(worker_id)
        await self._publish()

    async def _prepare(self, worker_id: str, address: str) -> None:
        """Has an expert worker load its slots; waits until every expert worker has a node."""
        async with self._placed:
            self._placed.notify_all()
            await self._placed.wait_for(lambda: self._state.placement() is not None)
        slots = [
            expert_pb2.SlotAssignment(layer_idx=s.layer_idx, slot_idx=s.slot_idx, expert_idx=s.expert_idx)
            for s in (self._state.placement() or {})[worker_id]
        ]
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub: expert_pb2_grpc.ExpertAsyncStub = expert_pb2_grpc.ExpertStub(channel)
            try:
                held = await stub.Describe(
                    expert_pb2.DescribeRequest(), metadata=self._handshake.to_metadata(), wait_for_ready=True
                )
                self._state.on_version_seen(held.table_version)
                request = expert_pb2.LoadSlotsRequest(
                    table_version=self._state.next_table_version, slots=slots
                )
                await stub.LoadSlots(request, metadata=self._handshake.to_metadata())
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error) from error

    async def _lose(self, worker_id: str, role: str, problem: str) -> None:
        if self._state.member(worker_id).is_ready:
            _log.warning("lost %s: %s; starting it again", worker_id, problem)
            self._metrics.counter("restarts_total", role=role).inc()
        self._state.on_lost(worker_id, problem=problem)
        with contextlib.suppress(WorkerLost):
            self._launcher.kill(worker_id)
        self._unheard.discard(worker_id)
        await self._publish()

    async def _publish(self) -> None:
        if self._unheard:
            return
        await self._server.publish(self._state.snapshot())
        self._metrics.gauge("table_version").set(self._state.table_version)
        counts: dict[tuple[str, str], int] = {}
        for member in self._state.members():
            for state in ("ready", "starting"):
                key = (member.role, state)
                counts[key] = counts.get(key, 0) + (member.is_ready == (state == "ready"))
        for (role, state), count in counts.items():
            self._metrics.gauge("members", role=role, state=state).set(count)
