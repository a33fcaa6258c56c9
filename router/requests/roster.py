"""The newest cluster view, and waiting for it to change."""

import asyncio
from collections.abc import Callable

from router.requests.members import ClusterView, view_of
from wire.errors import NotReady
from wire.proto import control_pb2


class Roster:
    """Follows snapshots. `update` is the only writer; everything runs on one asyncio loop."""

    def __init__(self) -> None:
        self.view = ClusterView()
        """The newest view."""
        self.snapshot: control_pb2.ClusterSnapshot | None = None
        """The newest snapshot as it came, or None before the first."""
        self._changed = asyncio.Event()

    def update(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        """Takes a newer snapshot and wakes whoever waits."""
        self.snapshot = snapshot
        self.view = view_of(snapshot)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self, timeout_s: float) -> bool:
        """Whether a newer snapshot came within `timeout_s`."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def wait_for(self, is_enough: Callable[[ClusterView], bool], *, timeout_s: float) -> ClusterView:
        """The first view that is enough.

        Raises:
            NotReady: none came within `timeout_s`; says what the cluster waits for.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while not is_enough(self.view):
            left_s = end_s - loop.time()
            if left_s <= 0 or not await self.wait_change(left_s):
                if is_enough(self.view):
                    break
                raise NotReady(
                    f"the cluster cannot take requests after {timeout_s:g} s; "
                    f"it waits for {self.view.waiting_for or 'other workers'}"
                )
        return self.view

    async def wait_ready(self, timeout_s: float) -> ClusterView:
        """The first view in which requests can run.

        Raises:
            NotReady: none came within `timeout_s`; says what the cluster waits for.
        """
        return await self.wait_for(lambda view: view.is_ready, timeout_s=timeout_s)
