"""Carries out what `TableLife` decides: orders to expert workers, snapshots, waking who waits."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from cluster.control.tables import LoadOrder
from cluster.control_server import ControlServer
from cluster.expert_link import ExpertLink
from cluster.state import ClusterState
from wire.errors import MorayError
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.phases import PHASES

_log = logging.getLogger(__name__)


class Rollout:
    """Lines to the expert workers, loads under way, and the snapshots; on the controller's loop."""

    def __init__(
        self,
        state: ClusterState,
        *,
        server: ControlServer,
        handshake: Handshake,
        metrics: Metrics,
        retry_s: float,
    ) -> None:
        """Makes one that knows no worker.

        Args:
            state: what the controller knows and decides from.
            server: publishes snapshots.
            handshake: as expert workers expect it.
            metrics: the controller's.
            retry_s: seconds before a worker that could not load is asked again.
        """
        self._state = state
        self._server = server
        self._handshake = handshake
        self._metrics = metrics
        self._retry_s = retry_s
        self._changed = asyncio.Condition()
        """Notified after every event."""
        self._is_closed = False
        self._links: dict[str, ExpertLink] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._table_unix_s = time.time()
        self.failures: dict[str, MorayError] = {}
        """Worker -> why its last load failed."""
        self.unheard: set[str] = set()
        """Workers of an earlier controller that have not reported yet; until then nothing is said."""
        metrics.gauge("table_age_seconds").set_function(lambda: time.time() - self._table_unix_s)

    def link(self, worker_id: str) -> ExpertLink:
        """The line to a worker that `connect` knows."""
        return self._links[worker_id]

    async def connect(self, worker_id: str, address: str) -> ExpertLink:
        """A new line to an expert worker's process; ends the one to the process before."""
        await self.disconnect(worker_id)
        link = self._links[worker_id] = ExpertLink(address, self._handshake)
        return link

    async def disconnect(self, worker_id: str) -> None:
        """Ends the line to a worker, and what it was loading."""
        self.failures.pop(worker_id, None)
        if load := self._loads.pop(worker_id, None):
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        if link := self._links.pop(worker_id, None):
            await link.close()

    async def close(self) -> None:
        """Ends every line; what is heard later has no consequences."""
        self._is_closed = True
        for worker_id in list(self._links):
            await self.disconnect(worker_id)

    async def wait_for(self, holds: Callable[[], bool]) -> None:
        """Returns when something is so; looked at after every event."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def follow_up(self, *, has_news: bool = False) -> None:
        """Does what follows from what is known now: a new table, loads, a snapshot; wakes who waits.

        Args:
            has_news: members changed, so a snapshot goes out in any case.
        """
        if self._is_closed:
            return
        tables = self._state.tables
        was_loading = tables.num_loading > 0
        if tables.renew():
            has_news = True
            self._table_unix_s = time.time()
            _log.info("routing table %d", self._state.table_version)
        for order in tables.plan_loads():
            self.failures.pop(order.worker_id, None)
            self._loads[order.worker_id] = asyncio.create_task(self._load(order), name=order.worker_id)
        if has_news or was_loading != (tables.num_loading > 0):
            await self.publish()
        async with self._changed:
            self._changed.notify_all()

    async def publish(self) -> None:
        """Sends the next snapshot, once everyone who runs has been heard."""
        if self.unheard:
            return
        await self._server.publish(self._state.snapshot(table_unix_s=self._table_unix_s))
        self._metrics.gauge("table_version").set(self._state.table_version)
        counts: dict[tuple[str, str], int] = {}
        for member in self._state.members():
            for state in ("ready", "starting"):
                key = (member.duty, state)
                counts[key] = counts.get(key, 0) + (member.is_ready == (state == "ready"))
        for (role, state), count in counts.items():
            self._metrics.gauge("members", role=role, state=state).set(count)
        table = self._state.tables.table
        phase_of = (
            [table.worker_phases.get(worker_id, "both") for worker_id in table.worker_ids] if table else []
        )
        for phase in (*PHASES, "both"):
            self._metrics.gauge("phase_workers", phase=phase).set(phase_of.count(phase))

    async def _load(self, order: LoadOrder) -> None:
        began_s = time.monotonic()
        try:
            await self._links[order.worker_id].load(order)
        except MorayError as error:
            _log.warning("%s could not load %d experts: %s", order.worker_id, order.num_new, error.message)
            self.failures[order.worker_id] = error
            self._state.tables.on_load_failed(order)
            await self.follow_up()
            await asyncio.sleep(self._retry_s)
            self._state.tables.retry(order.worker_id)
        else:
            took_s = time.monotonic() - began_s
            _log.info("%s loaded %d experts in %.1f s", order.worker_id, order.num_new, took_s)
            self._metrics.counter("experts_loaded_total").inc(order.num_new)
            self._state.tables.on_loaded(order)
        await self.follow_up()


async def cancel(*tasks: "asyncio.Task[None]") -> None:
    """Cancels tasks and waits for their end."""
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
