"""Ray actors: thin shells that give a server of another room a process, a node and a life.

`start` is idempotent: a restarted controller calls it on actors that run already and gets the same report.
"""

import asyncio
import logging
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ray
import ray.util

from cluster.config import MorayConfig
from cluster.logs import configure_logging
from cluster.models import find_model
from cluster.sigterm import SigtermWatch
from model.kernels.native.library import limit_spinning
from wire.metrics import Metrics

if TYPE_CHECKING:
    from router.front.service import RouterService


@dataclass(frozen=True, kw_only=True)
class StartSpec:
    """What a worker is told at start."""

    worker_id: str
    role: str
    config: MorayConfig
    controller_address: str


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """Where a started worker can be reached."""

    address: str
    metrics_address: str
    node_id: str
    """Ray's id of the node it runs on."""
    started_s: int
    """Unix second in which it started."""
    pid: int
    """Its process on that node."""
    num_pages: int = 0
    trouble: str = ""
    """Why it takes no requests yet; "" = it does."""


_log = logging.getLogger(__name__)

_FAREWELL_S = 1.0
_ANY_HOST = ("0.0.0.0", "::")


def node_address() -> str:
    """The address at which other nodes reach this one."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types here
    return address


def find_actor(name: str, *, namespace: str) -> Any | None:
    """The handle of a live named actor, or None."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


class _Server(Protocol):
    metrics: Metrics

    async def start(self, port: int = 0) -> int: ...

    async def stop(self) -> None: ...


@runtime_checkable
class _Attention(Protocol):
    @property
    def trouble(self) -> str: ...

    async def drain(self) -> None: ...


class MemberActor:
    """What every member has in Ray; its methods run on the actor's asyncio loop.

    SIGTERM is as good as `stop`: the process ends when it has left in order.
    """

    def __init__(self) -> None:
        self._sigterm: SigtermWatch | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._exiting: asyncio.Task[None] | None = None
        self._report: StartReport | None = None
        self._starting = asyncio.Lock()
        self._stopped = asyncio.Event()

    async def start(self, spec: StartSpec) -> StartReport:
        """Starts serving, and says where; the same report again when it serves already.

        Raises:
            ModelBroken: the checkpoint cannot be served.
            ConfigError: the model is not on this host, or a port is taken; names the field.
        """
        async with self._starting:
            if self._report is None:
                configure_logging(spec.config.log_level, role=spec.role, member_id=spec.worker_id)
                self._report = await self._serve(spec)
                self._sigterm = SigtermWatch(self._on_sigterm)
            return replace(self._report, trouble=self._trouble())

    async def wait_stopped(self) -> None:
        """Returns after `stop`; fails with Ray's actor error when the process dies first."""
        await self._stopped.wait()

    async def stop(self) -> None:
        """Ends what it serves."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(), name="leave")
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        await self._end()
        self._stopped.set()

    def _on_sigterm(self) -> None:
        _log.info("SIGTERM: leaving")
        if self._exiting is None:
            self._exiting = asyncio.create_task(self._leave_and_exit(), name="sigterm")

    async def _leave_and_exit(self) -> None:
        await self.stop()
        # The controller hears of it through `wait_stopped`; one that is away will see a process gone.
        await asyncio.sleep(_FAREWELL_S)
        os._exit(128 + signal.SIGTERM)

    def _trouble(self) -> str:
        return ""

    async def _serve(self, spec: StartSpec) -> StartReport:
        raise NotImplementedError

    async def _end(self) -> None:
        raise NotImplementedError


class WorkerActor(MemberActor):
    """An expert or attention worker; `stop` lets running requests finish first (drain_s of its group)."""

    def __init__(self) -> None:
        super().__init__()
        self._server: _Server | None = None

    async def _serve(self, spec: StartSpec) -> StartReport:
        host = node_address()
        # Off the loop: reading weights takes long, and the actor must answer meanwhile.
        self._server = await asyncio.to_thread(_make_server, spec, host)
        port = await self._server.start()
        metrics_port = self._server.metrics.serve(host, 0)
        num_pages = 0 if spec.role == "expert" else getattr(spec.config, spec.role).num_pages
        return _report(f"{host}:{port}", f"{host}:{metrics_port}", num_pages=num_pages)

    def _trouble(self) -> str:
        return self._server.trouble if isinstance(self._server, _Attention) else ""

    async def _end(self) -> None:
        if self._server is not None:
            if isinstance(self._server, _Attention):
                await self._server.drain()
            await self._server.stop()


class RouterActor(MemberActor):
    """A router; `stop` lets running requests finish first (router.drain_s)."""

    def __init__(self) -> None:
        super().__init__()
        self._service: RouterService | None = None

    async def _serve(self, spec: StartSpec) -> StartReport:
        from router.front.service import RouterService

        config = spec.config.router
        host = node_address() if config.host in _ANY_HOST else config.host
        self._service = RouterService(
            config, controller_address=spec.controller_address, name=spec.worker_id, advertise_host=host
        )
        await self._service.start()
        return _report(f"{host}:{self._service.grpc_port}", f"{host}:{self._service.http_port}")

    async def _end(self) -> None:
        if self._service is not None:
            await self._service.drain()
            await self._service.stop()


def _report(address: str, metrics_address: str, *, num_pages: int = 0) -> StartReport:
    return StartReport(
        address=address,
        metrics_address=metrics_address,
        node_id=ray.get_runtime_context().get_node_id(),
        started_s=int(time.time()),
        pid=os.getpid(),
        num_pages=num_pages,
    )


def _make_server(spec: StartSpec, host: str) -> _Server:
    # Threads that spin while expert workers on the same processors compute would take their time.
    limit_spinning()
    # Imported here: only workers load torch, not the controller that also imports this module.
    from workers.attention.build import EngineConfig
    from workers.attention.server import AttentionServer, AttentionSettings
    from workers.expert.server import ExpertServer, ExpertSettings

    config = spec.config
    path = find_model(config.model).path
    if spec.role == "expert":
        expert = ExpertSettings(group=config.expert, compute=config.compute, host=host)
        return ExpertServer(spec.worker_id, checkpoint_dir=path, settings=expert)
    settings = AttentionSettings(
        engine=EngineConfig(
            group=getattr(config, spec.role),
            compute=config.compute,
            kv=config.kv,
            mtp=config.mtp,
            selection_bias=config.selection_bias,
        ),
        dispatch=config.dispatch,
        controller_address=spec.controller_address,
        host=host,
    )
    return AttentionServer(spec.worker_id, checkpoint_dir=path, settings=settings)


def actor_class(role: str) -> Any:
    """The Ray actor class of a role; Any, since Ray's decorators are untyped."""
    return ray.remote(RouterActor if role == "router" else WorkerActor)
