"""The controller's gRPC server: pushes snapshots to everyone who watches."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from cluster.control.members import ELASTIC_ROLES
from wire.errors import InvalidRequest
from wire.metrics import Metrics
from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import SERVER_OPTIONS, Context, stream_errors, unary_errors


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """What a rebalancing came to."""

    table_version: int
    num_moved: int
    """Copies of experts that were loaded."""


class ControlHandler(Protocol):
    """Who carries out what is asked of the controller."""

    async def shutdown(self) -> None:
        """Ends the whole cluster."""

    async def on_report(self, report: control_pb2.ReportRequest) -> None:
        """An attention worker says which table it uses, and whether it takes requests."""

    async def scale(self, role: str, num_workers: int) -> int:
        """Gives a role so many workers; the version of the table then."""

    async def set_role(self, worker_id: str, role: str) -> int:
        """Has an attention worker work in another role; the version of the snapshot that says so."""

    async def drain(self, node: str) -> list[str]:
        """Has attention workers leave a node; those that did."""

    async def rebalance(self, *, force: bool, seed: int) -> Rebalanced:
        """Plans the placement anew and carries it out."""


class ControlServer(control_pb2_grpc.ControlServicer):
    """Serves Control; `publish` is called from the same loop."""

    def __init__(self, handler: ControlHandler, *, metrics: Metrics) -> None:
        self._handler = handler
        self._metrics = metrics
        self._newest: control_pb2.ClusterSnapshot | None = None
        self._changed = asyncio.Condition()
        self._num_watchers = 0
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> int:
        """Listens at host:port; returns the port.

        Raises:
            RuntimeError: the port is taken.
        """
        server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(self, server)
        port = server.add_insecure_port(address)
        await server.start()
        self._server = server
        return port

    async def stop(self) -> None:
        """Ends every stream and frees the port."""
        if self._server is not None:
            await self._server.stop(0.5)

    async def publish(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        """Sends a snapshot to every watcher; one that is slow skips to the newest."""
        async with self._changed:
            self._newest = snapshot
            self._changed.notify_all()
        self._metrics.gauge("snapshot_version").set(snapshot.version)

    @stream_errors
    async def Watch(
        self, request: control_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[control_pb2.ClusterSnapshot]:
        """The newest snapshot at once, then each newer one."""
        seen_version = 0
        self._num_watchers += 1
        self._metrics.gauge("watchers").set(self._num_watchers)
        try:
            while True:
                snapshot = await self._wait_newer(seen_version)
                seen_version = snapshot.version
                yield snapshot
        finally:
            self._num_watchers -= 1
            self._metrics.gauge("watchers").set(self._num_watchers)

    @unary_errors
    async def Shutdown(
        self, request: control_pb2.ShutdownRequest, context: Context
    ) -> control_pb2.ShutdownResponse:
        """Stops the whole cluster."""
        await self._handler.shutdown()
        return control_pb2.ShutdownResponse()

    @unary_errors
    async def Report(
        self, request: control_pb2.ReportRequest, context: Context
    ) -> control_pb2.ReportResponse:
        """Notes which table an attention worker uses, and whether it takes requests."""
        await self._handler.on_report(request)
        return control_pb2.ReportResponse()

    @unary_errors
    async def Scale(self, request: control_pb2.ScaleRequest, context: Context) -> control_pb2.ScaleResponse:
        """Gives a role another number of workers; answers when the cluster is so."""
        role = _role_name(request.role)
        if role not in ELASTIC_ROLES:
            raise InvalidRequest(f"role: wanted one of {', '.join(ELASTIC_ROLES)}; got {role}", field="role")
        version = await self._handler.scale(role, request.num_workers)
        return control_pb2.ScaleResponse(table_version=version)

    @unary_errors
    async def SetRole(
        self, request: control_pb2.SetRoleRequest, context: Context
    ) -> control_pb2.SetRoleResponse:
        """Has an attention worker work in another role; answers when routers are told."""
        version = await self._handler.set_role(request.worker_id, _role_name(request.role))
        return control_pb2.SetRoleResponse(snapshot_version=version)

    @unary_errors
    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        """Has attention workers leave a node; answers when they have."""
        return control_pb2.DrainResponse(worker_ids=await self._handler.drain(request.node))

    @unary_errors
    async def Rebalance(
        self, request: control_pb2.RebalanceRequest, context: Context
    ) -> control_pb2.RebalanceResponse:
        """Plans the placement anew; answers when it is in force."""
        done = await self._handler.rebalance(force=request.force, seed=request.seed)
        return control_pb2.RebalanceResponse(table_version=done.table_version, num_moved=done.num_moved)

    async def _wait_newer(self, seen_version: int) -> control_pb2.ClusterSnapshot:
        async with self._changed:
            while self._newest is None or self._newest.version <= seen_version:
                await self._changed.wait()
            return self._newest


def _role_name(role: "control_pb2.Role.ValueType") -> str:
    """`decode` for ROLE_DECODE; a number that is none of the roles as it is."""
    names = control_pb2.Role.DESCRIPTOR.values_by_number
    return names[role].name.removeprefix("ROLE_").lower() if role in names else str(int(role))
