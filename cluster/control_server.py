"""The controller's gRPC server: pushes snapshots to everyone who watches."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from wire.metrics import Metrics
from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import SERVER_OPTIONS, Context, stream_errors, unary_errors


class ControlHandler(Protocol):
    """Who carries out what is asked of the controller."""

    async def shutdown(self) -> None:
        """Ends the whole cluster."""

    async def on_report(self, member_id: str, table_version: int) -> None:
        """An attention worker says which table it uses."""


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
        """Notes which table an attention worker uses."""
        await self._handler.on_report(request.member_id, request.table_version)
        return control_pb2.ReportResponse()

    async def _wait_newer(self, seen_version: int) -> control_pb2.ClusterSnapshot:
        async with self._changed:
            while self._newest is None or self._newest.version <= seen_version:
                await self._changed.wait()
            return self._newest
