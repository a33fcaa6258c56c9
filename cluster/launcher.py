"""Starts and stops worker actors: the controller's hands in Ray."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.util

# Ray's public interface does not say which nodes are about to go.
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import StartReport, StartSpec, actor_class, find_actor
from cluster.config import MorayConfig
from cluster.homes import Home, Needs, NodeCapacity, plan_home
from cluster.topology.types import NodeTopology, RayNode, TopologyReader
from wire.errors import InvalidRequest, MorayError, NotReady, WorkerLost

_MEMBER_NAME = re.compile(r"(expert|prefill|decode|both|router)-[0-9]+")
_NAME_S = 10.0
_NAME_POLL_S = 0.05
_KILL_S = 0.3
"""What Ray's own way of ending a process gets before it is killed."""


class Launcher:
    """Actors by worker id, each on the node that `plan_home` chooses; used by one asyncio loop."""

    def __init__(self, config: MorayConfig, *, controller_address: str, topology: TopologyReader) -> None:
        self._config = config
        self._controller_address = controller_address
        self._topology = topology
        self._head_node_id: str = ray.get_runtime_context().get_node_id()
        self._homes: dict[str, Home] = {}
        self._actors: dict[str, Any] = {}
        self._pids: dict[str, tuple[str, int]] = {}
        """Worker id -> node and process."""
        self._killed: set[str] = set()
        """Ids of actors that were killed; Ray may name one a little longer."""
        self._cordoned: set[str] = set()
        """Ids of nodes on which nothing is started any more."""
        self._planning = asyncio.Lock()

    async def launch(self, worker_id: str, role: str) -> tuple[StartReport, NodeTopology]:
        """A started worker and its node: the actor that runs under the name already, or a new one.

        Raises:
            NotReady: no node can take it now.
            WorkerLost: its process died while it started.
            MorayError: what the worker itself raised.
        """
        async with self._planning:
            actor = await self._find_alive(worker_id) or await self._create(worker_id, role)
        self._actors[worker_id] = actor
        spec = StartSpec(
            worker_id=worker_id, role=role, config=self._config, controller_address=self._controller_address
        )
        report: StartReport = await self._call(worker_id, actor.start.remote(spec))
        self._homes[worker_id] = Home(report.node_id, self._needs(role))
        self._pids[worker_id] = (report.node_id, report.pid)
        return report, await self._topology_of(report.node_id)

    def running(self) -> list[str]:
        """Members whose actors run already, started by an earlier controller."""
        names: list[str] = ray.util.list_named_actors()
        return [name for name in sorted(names) if _MEMBER_NAME.fullmatch(name)]

    async def wait_lost(self, worker_id: str) -> None:
        """Returns when a worker stopped as it was told to.

        Raises:
            WorkerLost: its process is gone.
        """
        await self._call(worker_id, self._actors[worker_id].wait_stopped.remote())

    async def kill(self, worker_id: str) -> None:
        """Ends a worker's process now, if there is one, even one that is stopped (SIGSTOP)."""
        self._homes.pop(worker_id, None)
        actor = self._actors.pop(worker_id, None)
        node_id, pid = self._pids.pop(worker_id, ("", 0))
        if actor is None:
            return
        self._killed.add(actor._actor_id.hex())
        ray.kill(actor)
        # Ray asks a process to end and leaves it at that; one that is stopped would stay for ever.
        await asyncio.sleep(_KILL_S)
        if node_id == self._head_node_id:
            kill_ray_process(pid)
        elif node_id:
            affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
            remote: Any = ray.remote(kill_ray_process)
            remote.options(num_cpus=0, scheduling_strategy=affinity).remote(pid)

    async def stop(self, worker_id: str, *, grace_s: float) -> None:
        """Lets a worker end by itself, then kills it."""
        actor = self._actors.get(worker_id)
        if actor is not None:
            with contextlib.suppress(MorayError, TimeoutError):
                await asyncio.wait_for(self._call(worker_id, actor.stop.remote()), grace_s)
        await self.kill(worker_id)

    async def cordon(self, node: str) -> set[str]:
        """Starts nothing on a node from now on; the ids of what is meant.

        Args:
            node: Ray's id, a host name or an address.

        Raises:
            InvalidRequest: no such node is alive.
        """
        topologies = [capacity.topology for capacity in await self._nodes()]
        found = {t.node_id for t in topologies if node in (t.node_id, t.host, t.address)}
        if not found:
            known = ", ".join(f"{t.host} ({t.address})" for t in topologies)
            raise InvalidRequest(f"node: wanted one of {known}; got {node!r}", field="node")
        # A node that comes back has another id, so those that are gone can be forgotten.
        self._cordoned = (self._cordoned & {t.node_id for t in topologies}) | found
        return found

    @property
    def cordoned(self) -> list[str]:
        """Ids of the nodes on which nothing is started any more."""
        return sorted(self._cordoned)

    def recall_cordons(self, node_ids: Iterable[str]) -> None:
        """Starts nothing on nodes that the controller before has cordoned."""
        self._cordoned.update(node_ids)

    async def draining_nodes(self) -> set[str]:
        """Ids of the nodes that Ray is about to take away."""
        return set(await asyncio.to_thread(ray_state.get_draining_nodes))

    async def _call(self, worker_id: str, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MorayError):
                raise error.cause from None
            raise WorkerLost(f"{worker_id}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"{worker_id}: {type(error).__name__}") from error

    def _find(self, worker_id: str) -> Any | None:
        """The live actor of an earlier controller, so that a restarted one goes on with what runs."""
        return find_actor(worker_id, namespace=self._config.name)

    async def _find_alive(self, worker_id: str) -> Any | None:
        """As `_find`, but never an actor that was killed here: waits until Ray has let go of its name."""
        for _ in range(round(_NAME_S / _NAME_POLL_S)):
            actor = self._find(worker_id)
            if actor is None or actor._actor_id.hex() not in self._killed:
                return actor
            await asyncio.sleep(_NAME_POLL_S)
        raise NotReady(f"Ray still names the process of {worker_id} that was killed {_NAME_S:g} s ago")

    async def _create(self, worker_id: str, role: str) -> Any:
        needs = self._needs(role)
        nodes = [node for node in await self._nodes() if node.topology.node_id not in self._cordoned]
        if role == "router":
            nodes = [node for node in nodes if node.topology.node_id == self._head_node_id]
        node = plan_home(needs, nodes, list(self._homes.values()))
        if node is None:
            wanted = f"labels {dict(needs.node_selector)}, {needs.num_cpus:g} CPUs, {needs.num_gpus:g} GPUs"
            raise NotReady(f"none of {len(nodes)} nodes has {wanted} left")
        actor = (
            actor_class(role)
            .options(
                name=worker_id,
                namespace=self._config.name,
                lifetime="detached",
                max_restarts=0,
                num_cpus=needs.num_cpus,
                num_gpus=needs.num_gpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            )
            .remote()
        )
        self._homes[worker_id] = Home(node.node_id, needs)
        return actor

    def _needs(self, role: str) -> Needs:
        if role == "router":
            return Needs(group=role, node_selector={})
        group = getattr(self._config, role)
        return Needs(
            group=role,
            num_cpus=group.num_cpus,
            num_gpus=group.num_gpus,
            node_selector=group.node_selector,
            max_per_node=group.max_per_node,
        )

    async def _topology_of(self, node_id: str) -> NodeTopology:
        for node in await self._nodes():
            if node.topology.node_id == node_id:
                return node.topology
        raise WorkerLost(f"node {node_id} left the Ray cluster")

    async def _nodes(self) -> list[NodeCapacity]:
        alive = [_ray_node(raw) for raw in await asyncio.to_thread(ray.nodes) if raw["Alive"]]
        topologies = await asyncio.to_thread(self._topology.read, alive)
        return [
            NodeCapacity(
                topology=topology,
                num_cpus=node.resources.get("CPU", 0.0),
                num_gpus=node.resources.get("GPU", 0.0),
            )
            for node, topology in zip(alive, topologies, strict=True)
        ]


def _ray_node(raw: dict[str, Any]) -> RayNode:
    return RayNode(
        node_id=raw["NodeID"],
        address=raw["NodeManagerAddress"],
        host=raw["NodeManagerHostname"],
        labels=raw.get("Labels") or {},
        resources=raw.get("Resources") or {},
    )


def kill_ray_process(pid: int) -> None:
    """Ends one of Ray's processes on this host; nothing when it is gone, or when it is not Ray's."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        if title.startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
