"""Reports to the controller: which routing table the engine uses, and whether the worker takes requests."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS
from workers.attention.health import Verdict

_log = logging.getLogger(__name__)

_EVERY_S = 1.0
"""A report is a sign of life too: nobody waits for who is silent (controller.reader_lease_s)."""
_DEADLINE_S = 2.0


class Reports:
    """Reports after every change and every second; runs on one asyncio loop."""

    def __init__(
        self,
        controller_address: str,
        *,
        member_id: str,
        table_in_use: Callable[[], Awaitable[int]],
        verdict: Callable[[], Verdict],
    ) -> None:
        """Makes one that says nothing yet.

        Args:
            controller_address: host:port.
            member_id: who reports.
            table_in_use: waits until no call under an older table than the newest is open; its version.
            verdict: whether the worker takes requests now.
        """
        self._address = controller_address
        self._member_id = member_id
        self._table_in_use = table_in_use
        self._verdict = verdict
        self._table_version = 0
        self._has_table = asyncio.Event()
        """The engine was offered a table that it may not use yet."""
        self._has_news = asyncio.Event()

    def notice_table(self) -> None:
        """The engine was offered a newer table: report as soon as it uses it."""
        self._has_table.set()

    def notice_verdict(self) -> None:
        """Whether the worker takes requests has changed: report now."""
        self._has_news.set()

    async def run(self) -> None:
        """Reports until cancelled; a controller that is away is told when it is back."""
        following = asyncio.create_task(self._follow_table(), name="table-in-use")
        try:
            async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
                while True:
                    self._has_news.clear()
                    await self._send(stub)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._has_news.wait(), _EVERY_S)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow_table(self) -> None:
        """A step that takes long keeps the table from being told, not the signs of life."""
        while True:
            await self._has_table.wait()
            self._has_table.clear()
            self._table_version = await self._table_in_use()
            self._has_news.set()

    async def _send(self, stub: "control_pb2_grpc.ControlAsyncStub") -> None:
        verdict = self._verdict()
        report = control_pb2.ReportRequest(
            member_id=self._member_id,
            table_version=self._table_version,
            trouble=verdict.trouble,
            needs_restart=verdict.needs_restart,
        )
        try:
            await stub.Report(report, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            _log.debug("report to the controller at %s: %s", self._address, error.code())
