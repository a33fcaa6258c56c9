"""The controller: brings every member to life and keeps it there, places experts, publishes snapshots.

One task supervises each member: launch, prepare (expert workers load their slots), activate (publish),
watch over it until it is lost, and again. Expert workers are lost when their actor dies or their heartbeats
stop. What is loaded where, and which table follows, `ClusterState` decides after every event. The controller
stores nothing: a restarted one finds its actors by name, and each of them says what it is and holds already.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from cluster.balancer import Balancer
from cluster.config import MorayConfig
from cluster.control.heartbeat import Pulse
from cluster.control.members import ATTENTION_ROLES, ELASTIC_ROLES, MemberState, role_of
from cluster.control_server import ControlServer, Rebalanced
from cluster.expert_link import ExpertLink
from cluster.launcher import Launcher
from cluster.rollout import Rollout, cancel
from cluster.state import ClusterState
from wire.errors import ClientError, InvalidRequest, ModelBroken, MorayError, WorkerLost
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import control_pb2, expert_pb2
from workers.expert.types import slots_from_proto

_log = logging.getLogger(__name__)

_LOOK_S = 2.0
_RECALL_S = 5.0
"""What a worker of an earlier controller gets to say how many workers there should be."""


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
        self._rollout = Rollout(
            state,
            server=self._server,
            handshake=self._handshake,
            metrics=metrics,
            retry_s=config.controller.restart_delay_s,
        )
        self._balancer = Balancer(config.balance, state=state, rollout=self._rollout, metrics=metrics)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What supervises each member, and what runs beside."""
        self._scale = expert_pb2.Scale()
        """What people asked for: sizes, roles, nodes to stay away from; its version counts the changes."""
        self._reported_s: dict[str, float] = {}
        """When each attention worker was last heard of."""
        self._hopeless: dict[str, str] = {}
        """Attention worker -> the trouble that only another process mends; "" = none."""
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
        # After a restart nothing is said until everyone who runs has reported: to the watchers of the last
        # snapshot a half-known cluster would look like one whose workers are gone.
        running = self._launcher.running()
        await self._recall(running)
        supervised = [member for member in self._state.members() if member.role != "controller"]
        self._rollout.unheard = {member.worker_id for member in supervised} & set(running)
        await self._rollout.publish()
        for member in supervised:
            self._supervise_from_now(member.worker_id)
            if member.is_leaving:
                self._run_beside(f"retire-{member.worker_id}", self._retire(member.worker_id))
        for node_id in self._launcher.cordoned:
            self._run_beside(f"drain-{node_id}", self._drain_quietly(node_id))
        self._run_beside("leases", self._expire_readers())
        self._run_beside("drains", self._follow_drains())
        self._run_beside("balance", self._balancer.run())
        await self.stopped.wait()
        # The answer to the Shutdown call is still on its way.
        await self._server.stop()

    # ---- what is asked of the controller ----

    async def shutdown(self) -> None:
        """Ends the router (draining), then every worker; returns when they are gone."""
        await cancel(*self._tasks.values())
        await self._rollout.close()
        members = [member for member in self._state.members() if member.role != "controller"]
        routers = [m.worker_id for m in members if m.role == "router"]
        workers = [m.worker_id for m in members if m.role != "router"]
        grace_s = self._config.router.drain_s + 5
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=grace_s) for worker_id in routers))
        await asyncio.gather(*(self._launcher.stop(worker_id, grace_s=5) for worker_id in workers))
        self.stopped.set()

    async def on_report(self, report: control_pb2.ReportRequest) -> None:
        """An attention worker says which table it uses, so that what only older ones name can be freed.

        The router leaves one alone that has trouble.
        """
        member_id = report.member_id
        self._reported_s[member_id] = time.monotonic()
        self._hopeless[member_id] = report.trouble if report.needs_restart else ""
        has_news = self._state.on_trouble(member_id, report.trouble)
        if has_news:
            _log.warning("%s: %s", member_id, report.trouble or "takes requests")
        if self._state.on_report(member_id, report.table_version) or has_news:
            await self._rollout.follow_up(has_news=has_news)

    async def scale(self, role: str, num_workers: int) -> int:
        """Has a role so many members; returns the table's version when they work and the others have left.

        Raises:
            ConfigError: too few to serve, or for the experts.
        """
        plan = self._state.resize(role, num_workers)
        self._remember()
        for worker_id in plan.new:
            self._supervise_from_now(worker_id)
        for worker_id in plan.leaving:
            self._run_beside(f"retire-{worker_id}", self._retire(worker_id))
        await self._rollout.follow_up(has_news=True)
        await self._rollout.wait_for(lambda: self._has_size(role, num_workers))
        return self._state.table_version

    async def set_role(self, worker_id: str, role: str) -> int:
        """Has an attention worker work in another role; returns the version of the snapshot that says so.

        What runs on it finishes; routers send what is new.

        Raises:
            InvalidRequest: no such worker or role.
            ConfigError: nobody would do what it does now.
        """
        self._state.set_role(worker_id, role)
        self._remember()
        await self._rollout.follow_up(has_news=True)
        _log.info("%s works as %s", worker_id, role)
        return self._state.snapshot_version

    async def drain(self, node: str) -> list[str]:
        """Has attention workers leave a node for others, and starts nothing there any more; those that left.

        Expert workers stay until the node is gone: their experts are served by copies, or loaded elsewhere.

        Args:
            node: Ray's id of it, its host name or its address.

        Raises:
            InvalidRequest: no such node is alive.
        """
        node_ids = await self._launcher.cordon(node)
        self._remember()
        # After a restart it is not known at once who runs where.
        await self._rollout.wait_for(self._has_heard_attention)
        leaving = [
            member
            for member in self._state.members()
            if member.role in ATTENTION_ROLES and member.node and member.node.node_id in node_ids
        ]
        names = [member.worker_id for member in leaving if member.address]
        _log.info("node %s is drained: %s leave it", node, names or "no attention workers")
        grace_s = self._config.controller.retire_s
        await asyncio.gather(
            *(self._launcher.stop(m.worker_id, grace_s=grace_s + self._drain_s(m.role)) for m in leaving)
        )
        return names

    async def rebalance(self, *, force: bool, seed: int) -> Rebalanced:
        """Plans the placement anew and carries it out; see Balancer.rebalance."""
        return await self._balancer.rebalance(force=force, seed=seed)

    def _remember(self) -> None:
        """Expert workers keep sizes, roles and cordons for a controller that starts again."""
        self._scale = expert_pb2.Scale(
            version=self._scale.version + 1,
            num_workers=self._state.num_workers(),
            roles=self._state.assigned_roles(),
            cordoned_nodes=self._launcher.cordoned,
            phases=self._state.tables.worker_phases,
        )

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
            if self._state.member(worker_id).is_leaving:
                return
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
                trouble=report.trouble,
            )
        )
        if role == "expert":
            await self._prepare(worker_id, report.address)
        elif role in ATTENTION_ROLES:
            self._reported_s[worker_id] = time.monotonic()
            self._hopeless[worker_id] = ""
        self._state.on_ready(worker_id)
        self._rollout.unheard.discard(worker_id)
        await self._rollout.follow_up(has_news=True)

    async def _prepare(self, worker_id: str, address: str) -> None:
        """Hears what an expert worker holds; returns when it holds what it should."""
        link = await self._rollout.connect(worker_id, address)
        held = await link.describe()
        self._state.on_described(worker_id, slots_from_proto(held.slots), table_version=held.table_version)
        self._rollout.unheard.discard(worker_id)
        await self._rollout.follow_up(has_news=True)
        failures = self._rollout.failures
        await self._rollout.wait_for(lambda: worker_id in failures or self._is_in_place(worker_id))
        if worker_id in failures:
            raise failures[worker_id]

    def _is_in_place(self, worker_id: str) -> bool:
        return self._state.is_prepared(worker_id) or self._state.member(worker_id).is_leaving

    async def _watch_over(self, worker_id: str, role: str) -> None:
        """Returns when a worker has stopped as it was told to.

        Raises:
            WorkerLost: its process is gone, or does not answer.
        """
        signs = [asyncio.create_task(self._launcher.wait_lost(worker_id), name=f"actor-{worker_id}")]
        if role == "expert":
            signs.append(asyncio.create_task(self._beat(worker_id), name=f"heart-{worker_id}"))
        elif role in ATTENTION_ROLES:
            signs.append(asyncio.create_task(self._listen(worker_id), name=f"reports-{worker_id}"))
        try:
            done, _ = await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancel(*signs)

    async def _beat(self, worker_id: str) -> None:
        """Asks for a sign of life again and again; fails when too many stay out."""
        every_s = self._config.controller.heartbeat_s
        pulse = Pulse(max_misses=self._config.controller.heartbeat_misses)
        link = self._rollout.link(worker_id)
        while not pulse.is_lost:
            began_s = time.monotonic()
            if dict(self._scale.phases) != self._state.tables.worker_phases:
                self._remember()
            try:
                report = await link.beat(self._scale, deadline_s=every_s)
                self._balancer.on_beat(report)
                pulse = pulse.after(answered=True)
            except MorayError as error:
                _log.warning("heartbeat of %s: %s", worker_id, error.message)
                self._metrics.counter("heartbeats_missed_total").inc()
                was_late = time.monotonic() - began_s > 2 * every_s
                pulse = pulse.after(answered=False, was_late=was_late)
            await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))
        raise WorkerLost(f"{worker_id} has not answered {pulse.num_missed} heartbeats")

    async def _listen(self, worker_id: str) -> None:
        """Fails when an attention worker has not reported for too long, or says that it is past mending."""
        every_s = self._config.controller.report_s
        pulse = Pulse(max_misses=self._config.controller.report_misses)
        while not pulse.is_lost:
            began_s = time.monotonic()
            await asyncio.sleep(every_s)
            if trouble := self._hopeless[worker_id]:
                raise WorkerLost(f"{worker_id}: {trouble}")
            was_heard = self._reported_s.get(worker_id, 0.0) >= began_s
            was_late = time.monotonic() - began_s > 2 * every_s
            if not was_heard:
                self._metrics.counter("heartbeats_missed_total").inc()
            pulse = pulse.after(answered=was_heard, was_late=was_late)
        raise WorkerLost(f"{worker_id} has not reported for {pulse.num_missed * every_s:g} s")

    async def _lose(self, worker_id: str, role: str, problem: str) -> None:
        if self._state.member(worker_id).is_ready:
            _log.warning("lost %s: %s; starting it again", worker_id, problem)
            self._metrics.counter("restarts_total", role=role).inc()
        self._state.on_lost(worker_id, problem=problem)
        self._state.place()
        self._rollout.unheard.discard(worker_id)
        # Others need not wait for the end of a process that does not answer.
        await self._rollout.follow_up(has_news=True)
        with contextlib.suppress(WorkerLost):
            await self._launcher.kill(worker_id)
        await self._rollout.disconnect(worker_id)

    async def _retire(self, worker_id: str) -> None:
        """Lets a member go: an expert worker when no table in use names it, an attention worker drained.

        The router replays on another one what such a worker cannot finish.
        """
        role = role_of(worker_id)
        if role == "expert":
            await self._rollout.wait_for(
                lambda: self._holds_nothing(worker_id) or not self._state.member(worker_id).is_leaving
            )
        if not self._state.member(worker_id).is_leaving:
            return
        await cancel(self._tasks.pop(worker_id))
        await self._launcher.stop(worker_id, grace_s=self._drain_s(role) + self._config.controller.retire_s)
        await self._rollout.disconnect(worker_id)
        self._state.on_gone(worker_id)
        _log.info("%s has left", worker_id)
        await self._rollout.follow_up(has_news=True)

    def _drain_s(self, role: str) -> float:
        """What a member's running requests get, once it is told to stop."""
        return float(getattr(self._config, role).drain_s) if role in ATTENTION_ROLES else 0.0

    def _holds_nothing(self, worker_id: str) -> bool:
        """Whether nobody needs an expert worker; not known of one that has not said what it holds."""
        return worker_id not in self._rollout.unheard and self._state.tables.is_empty(worker_id)

    def _has_heard_attention(self) -> bool:
        """Whether every attention worker that ran when this controller started has said where it is."""
        return not any(role_of(worker_id) in ATTENTION_ROLES for worker_id in self._rollout.unheard)

    # ---- beside ----

    async def _recall(self, running: list[str]) -> None:
        """After a restart: what the controller before was asked for, kept by expert workers."""
        for worker_id in running:
            if role_of(worker_id) == "expert":
                with contextlib.suppress(MorayError, TimeoutError):
                    await asyncio.wait_for(self._recall_from(worker_id), _RECALL_S)
        # Sizes may rest on roles, and workers that have one may come only with the sizes.
        self._state.recall_roles(self._scale.roles)
        self._launcher.recall_cordons(self._scale.cordoned_nodes)
        for role, num_workers in self._scale.num_workers.items():
            self._state.resize(role, num_workers)
        self._state.recall_roles(self._scale.roles)
        if self._config.balance.placements == "by_phase":
            self._state.recall_phases(self._scale.phases)
        known = {member.worker_id for member in self._state.members()}
        for worker_id in running:
            if worker_id not in known and role_of(worker_id) in ELASTIC_ROLES:
                # It was leaving when the controller before died.
                self._state.on_found_leaving(worker_id, role_of(worker_id))

    async def _recall_from(self, worker_id: str) -> None:
        report, _ = await self._launcher.launch(worker_id, "expert")
        link = ExpertLink(report.address, self._handshake)
        try:
            scale = (await link.describe()).scale
        finally:
            await link.close()
        if scale.version > self._scale.version:
            self._scale = scale

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
                await self._rollout.follow_up()

    async def _follow_drains(self) -> None:
        """Drains the nodes that Ray drains (`ray drain-node`, an autoscaler, a preempted machine)."""
        known = set(self._launcher.cordoned)
        while True:
            draining = await self._launcher.draining_nodes()
            for node_id in sorted(draining - known):
                self._run_beside(f"drain-{node_id}", self._drain_quietly(node_id))
            known = draining
            await asyncio.sleep(_LOOK_S)

    async def _drain_quietly(self, node_id: str) -> None:
        with contextlib.suppress(InvalidRequest):
            # It may be gone already.
            await self.drain(node_id)

    def _has_size(self, role: str, num_workers: int) -> bool:
        """Whether a role has its members, all of them at work, or has been given another size since."""
        present = [member for member in self._state.members() if member.role == role]
        is_over = self._state.num_workers()[role] != num_workers
        is_whole = len(present) == num_workers and all(member.can_work for member in present)
        return is_over or (is_whole and self._state.tables.is_settled)

    def _supervise_from_now(self, worker_id: str) -> None:
        self._run_beside(worker_id, self._supervise(worker_id, role_of(worker_id)))

    def _run_beside(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)
