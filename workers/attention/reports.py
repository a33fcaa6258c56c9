"""Reports to the controller: which routing table the engine uses, so that older ones can be given up."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS

_log = logging.getLogger(__name__)

_EVERY_S = 2.0
"""A report is a sign of life too: nobody waits for who is silent (controller.reader_lease_s)."""
_DEADLINE_S = 2.0


class TableReports:
    """Reports after every change and every few seconds; runs on one asyncio loop."""

    def __init__(
        self, controller_address: str, *, member_id: str, table_in_use: Callable[[], Awaitable[int]]
    ) -> None:
        """Makes one that says nothing yet.

        Args:
            controller_address: host:port.
            member_id: who reports.
            table_in_use: waits until no call under an older table than the newest is open; its version.
        """
        self._address = controller_address
        self._member_id = member_id
        self._table_in_use = table_in_use
        self._has_changed = asyncio.Event()

    def notice_change(self) -> None:
        """The engine was offered a newer table: report as soon as it uses it."""
        self._has_changed.set()

    async def run(self) -> None:
        """Reports until cancelled; a controller that is away is told when it is back."""
        version = 0
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
            while True:
                if self._has_changed.is_set():
                    self._has_changed.clear()
                    version = await self._table_in_use()
                await self._send(stub, version)
                try:
                    await asyncio.wait_for(self._has_changed.wait(), _EVERY_S)
                except TimeoutError:
                    continue

    async def _send(self, stub: "control_pb2_grpc.ControlAsyncStub", version: int) -> None:
        report = control_pb2.ReportRequest(member_id=self._member_id, table_version=version)
        try:
            await stub.Report(report, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            _log.debug("report to the controller at %s: %s", self._address, error.code())
