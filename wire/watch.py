"""The client of the controller's table stream: holds the newest cluster snapshot, reconnects for ever."""

import asyncio
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS

_log = logging.getLogger(__name__)


class ClusterWatch:
    """Follows the controller; the last snapshot stays valid while the controller is away.

    Runs on one asyncio loop: `run` is the only writer of `snapshot`, callbacks are called from it.
    """

    def __init__(
        self,
        controller_address: str,
        *,
        member_id: str,
        on_snapshot: Callable[[control_pb2.ClusterSnapshot], None],
        retry_s: float = 0.5,
    ) -> None:
        self._address = controller_address
        self._member_id = member_id
        self._on_snapshot = on_snapshot
        self._retry_s = retry_s
        self.snapshot: control_pb2.ClusterSnapshot | None = None
        """The newest snapshot, or None before the first."""

    async def run(self) -> None:
        """Follows the stream until cancelled."""
        while True:
            async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                await self._follow(control_pb2_grpc.ControlStub(channel))
            await asyncio.sleep(self._retry_s)

    async def _follow(self, stub: "control_pb2_grpc.ControlAsyncStub") -> None:
        request = control_pb2.WatchRequest(member_id=self._member_id)
        try:
            async for snapshot in stub.Watch(request, wait_for_ready=True):
                self.snapshot = snapshot
                self._on_snapshot(snapshot)
        except grpc.aio.AioRpcError as error:
            _log.warning(
                "lost the controller at %s (%s); keeping the last table", self._address, error.code()
            )
