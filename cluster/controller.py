"""The controller: brings every member to life and keeps it there, places experts, publishes snapshots.

One task supervises each member: launch, prepare (expert workers load their slots), activate (publish),
watch over it until it is lost, and again. Expert workers are lost when their actor dies or their heartbeats
stop. What is loaded where, and which table follows, `ClusterState` decides after every event. The
controller stores nothing: a restarted one finds its actors by name, and each of them says what it is and
holds already.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from cluster.config import MorayConfig
from cluster.control.heartbeat import Pulse
from cluster.control.tables import LoadOrder
from cluster.control_server import ControlServer
from cluster.expert_link import ExpertLink, read_slots
from cluster.launcher import Launcher
from cluster.state import ATTENTION_ROLES, ClusterState, MemberState
from wire.errors import ClientError, ModelBroken, MorayError, WorkerLost
from wire.handshake import Handshake
from wire.metrics import Metrics

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
        self._server = ControlServer(self, metrics=metrics)
        self._changed = asyncio.Condition()
        """Notified after every event."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What supervises each member."""
        self._links: dict[str, ExpertLink] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._load_errors: dict[str, MorayError] = {}
        """Why the last load of a worker failed."""
        self._reported_s: dict[str, float] = {}
        """When each attention worker was last heard of."""
        self._table_unix_s = 0.0
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
        for member in supervised:
            self._start_task(member.worker_id, self._supervise(member.worker_id, member.role))
        self._start_task("leases", self._expire_readers())
        await self.stopped.wait()
        # The answer to the Shutdown call is still on its way.
        await self._server.stop()

    async def shutdown(self) -> None:
        """Ends the router (draining), then every worker; returns when they are gone."""
        tasks = [*self._tasks.values(), *self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        members = [member for member in self._state.members() if member.role != "controller"]
        routers = [m.worker_id for m in members if m.role == "router"]
        workers = [m.worker_id for m in members if m.role != "router"]
        grace_s = self._config.router.drain_s + 5
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=grace_s) for worker_id in routers))
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=5) for worker_id in workers))
        self.stopped.set()

    async def on_report(self, member_id: str, table_version: int) -> None:
        """An attention worker says which table it uses, so that what only older ones name can be freed."""
        self._reported_s[member_id] = time.monotonic()
        self._state.on_report(member_id, table_version)
        await self._follow_up()

    # ---- one member ----

    async def _supervise(self, worker_id: str, role: str) -> None:
        while True:
            problem = "stopped by itself"
            try:
                await asyncio.wait_for(self._bring_up(worker_id, role), self._config.controller.start_s)
                _log.info("%s is ready", worker_id)
                await self._watch_over(worker_id, role)
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
        elif role in ATTENTION_ROLES:
            self._reported_s[worker_id] = time.monotonic()
        self._state.on_ready(worker_id)
        self._unheard.discard(worker_id)
        await self._follow_up(has_news=True)

    async def _prepare(self, worker_id: str, address: str) -> None:
        """Hears what an expert worker holds; returns when it holds what it should."""
        link = self._links[worker_id] = ExpertLink(address, self._handshake)
        self._load_errors.pop(worker_id, None)
        held = await link.describe()
        self._state.on_described(worker_id, read_slots(held), table_version=held.table_version)
        self._unheard.discard(worker_id)
        await self._follow_up(has_news=True)
        async with self._changed:
            await self._changed.wait_for(
                lambda: worker_id in self._load_errors or self._state.is_prepared(worker_id)
            )
        if worker_id in self._load_errors:
            raise self._load_errors[worker_id]

    async def _watch_over(self, worker_id: str, role: str) -> None:
        """Returns when a worker has stopped as it was told to.

        Raises:
            WorkerLost: its process is gone, or does not answer.
        """
        signs = [asyncio.create_task(self._launcher.wait_lost(worker_id), name=f"actor-{worker_id}")]
        if role == "expert":
            signs.append(asyncio.create_task(self._beat(worker_id), name=f"heart-{worker_id}"))
        try:
            done, _ = await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in signs:
                task.cancel()
            await asyncio.gather(*signs, return_exceptions=True)

    async def _beat(self, worker_id: str) -> None:
        """Asks for a sign of life again and again; fails when too many stay out."""
        every_s = self._config.controller.heartbeat_s
        pulse = Pulse(max_misses=self._config.controller.heartbeat_misses)
        while not pulse.is_lost:
            began_s = time.monotonic()
            try:
                await self._links[worker_id].beat(deadline_s=every_s)
                pulse = pulse.after(answered=True)
            except MorayError as error:
                _log.warning("heartbeat of %s: %s", worker_id, error.message)
                self._metrics.counter("heartbeats_missed_total").inc()
                pulse = pulse.after(answered=False)
            await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))
        raise WorkerLost(f"{worker_id} has not answered {pulse.num_missed} heartbeats")

    async def _lose(self, worker_id: str, role: str, problem: str) -> None:
        if self._state.member(worker_id).is_ready:
            _log.warning("lost %s: %s; starting it again", worker_id, problem)
            self._metrics.counter("restarts_total", role=role).inc()
        self._state.on_lost(worker_id, problem=problem)
        self._unheard.discard(worker_id)
        # Others need not wait for the end of a process that does not answer.
        await self._follow_up(has_news=True)
        with contextlib.suppress(WorkerLost):
            await self._launcher.kill(worker_id)
        if load := self._loads.pop(worker_id, None):
            load.cancel()
        if link := self._links.pop(worker_id, None):
            await link.close()

    # ---- tables ----

    async def _follow_up(self, *, has_news: bool = False) -> None:
        """Does what follows from what is known now: a new table, loads, a snapshot, and wakes who waits."""
        tables = self._state.tables
        was_loading = tables.num_loading > 0
        if tables.renew():
            has_news = True
            self._table_unix_s = time.time()
            _log.info("routing table %d", self._state.table_version)
        for order in tables.plan_loads():
            self._loads[order.worker_id] = asyncio.create_task(self._load(order), name=order.worker_id)
        if has_news or was_loading != (tables.num_loading > 0):
            await self._publish()
        async with self._changed:
            self._changed.notify_all()

    async def _load(self, order: LoadOrder) -> None:
        began_s = time.monotonic()
        try:
            await self._links[order.worker_id].load(order, num_workers={})
        except MorayError as error:
            _log.warning("%s could not load %d experts: %s", order.worker_id, order.num_new, error.message)
            self._state.tables.on_load_failed(order)
            if not self._state.member(order.worker_id).is_ready:
                self._load_errors[order.worker_id] = error
            await self._follow_up()
            await asyncio.sleep(self._config.controller.restart_delay_s)
            self._state.tables.retry(order.worker_id)
        else:
            took_s = time.monotonic() - began_s
            _log.info("%s loaded %d experts in %.1f s", order.worker_id, order.num_new, took_s)
            self._state.tables.on_loaded(order)
        await self._follow_up()

    async def _expire_readers(self) -> None:
        """Forgets what attention workers said that are silent for long: they must not hold slots for ever."""
        lease_s = self._config.controller.reader_lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            late_s = time.monotonic() - lease_s
            silent = [member_id for member_id, heard_s in self._reported_s.items() if heard_s < late_s]
            for member_id in silent:
                del self._reported_s[member_id]
                self._state.tables.on_reader_lost(member_id)
            if silent:
                _log.warning("no report from %s; not waiting for them with old tables", ", ".join(silent))
                await self._follow_up()

    async def _publish(self) -> None:
        if self._unheard:
            return
        await self._server.publish(self._state.snapshot(table_unix_s=self._table_unix_s))
        self._metrics.gauge("table_version").set(self._state.table_version)
        counts: dict[tuple[str, str], int] = {}
        for member in self._state.members():
            for state in ("ready", "starting"):
                key = (member.role, state)
                counts[key] = counts.get(key, 0) + (member.is_ready == (state == "ready"))
        for (role, state), count in counts.items():
            self._metrics.gauge("members", role=role, state=state).set(count)

    def _start_task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)
