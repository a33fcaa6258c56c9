"""The router as a whole: binds its ports, follows the controller, drains and stops cleanly."""

import asyncio
import contextlib
import logging
import random

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.config import RouterConfig
from router.front.admission import Admission
from router.front.discovery import TargetGroup, role_name, targets_of
from router.front.http import HttpServer, HttpSources, make_app
from router.front.malformed import RefuseMalformed
from router.front.server import InferenceService
from router.requests.ledger import Ledger
from router.requests.line import Line, LineLimits
from router.requests.links import WorkerLinks
from router.requests.roster import Roster
from router.requests.session import SessionLimits, SessionRunner
from router.requests.waiting import WaitingRoom
from wire.errors import ConfigError
from wire.metrics import Metrics
from wire.proto import control_pb2, inference_pb2, inference_pb2_grpc
from wire.rpc import SERVER_OPTIONS
from wire.watch import ClusterWatch

_log = logging.getLogger(__name__)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_MAX_REQUEST_BYTES = 16 << 20
_STOP_S = 0.5
_ROLES = ("router", "controller", "expert", "prefill", "decode", "both")


class RouterService:
    """One router. Everything runs on the loop that calls `start`."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        controller_address: str,
        name: str = "router",
        advertise_host: str = "127.0.0.1",
        rng: random.Random | None = None,
    ) -> None:
        """Takes the config and who it is.

        Args:
            config: the router's section.
            controller_address: host:port of the controller's Control service.
            name: this router's id towards the controller and in /sd.
            advertise_host: host by which Prometheus reaches this router.
            rng: draws seeds and request ids; the system's randomness unless a test says otherwise.
        """
        self._config = config
        self._name = name
        self._advertise_host = advertise_host
        self.metrics = Metrics("router")
        self.roster = Roster()
        self._links = WorkerLinks()
        self._admission = Admission(max_active_requests=config.max_active_requests)
        limits = LineLimits(
            max_requests=config.max_queued_requests,
            max_wait_s=config.max_wait_s,
            tenant_share=config.queue_share,
        )
        self._room = WaitingRoom(
            Line(limits),
            roster=self.roster,
            max_wait_s=config.max_wait_s,
            overcommit=config.kv_overcommit,
            metrics=self.metrics,
        )
        self._runner = SessionRunner(
            roster=self.roster,
            room=self._room,
            links=self._links,
            limits=SessionLimits(
                num_replays=config.num_replays,
                ready_wait_s=config.ready_wait_s,
                prefix_pages=config.prefix_pages,
            ),
            metrics=self.metrics,
        )
        self._inference = InferenceService(
            config,
            roster=self.roster,
            runner=self._runner,
            admission=self._admission,
            metrics=self.metrics,
            rng=rng or random.SystemRandom(),
        )
        self._watch = ClusterWatch(controller_address, member_id=name, on_snapshot=self._on_snapshot)
        self._health = health.aio.HealthServicer()
        self._health_turn = asyncio.Event()
        self._grpc: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.grpc_port = 0
        """Port of the gRPC API; 0 before `start`."""
        self.http_port = 0
        """Port of the HTTP side; 0 before `start`."""

    @property
    def is_draining(self) -> bool:
        """New requests are refused."""
        return self._admission.is_closed

    @property
    def num_active(self) -> int:
        """Requests in flight."""
        return self._admission.num_active

    @property
    def ledger(self) -> Ledger:
        """What runs where, of the requests of this router."""
        return self._runner.ledger

    async def start(self) -> None:
        """Binds both ports and follows the controller.

        Raises:
            ConfigError: a port cannot be bound; names router.grpc_port or router.http_port.
        """
        await self._set_health()
        try:
            self.grpc_port = await self._start_grpc()
            http = HttpServer(make_app(self._http_sources()))
            self.http_port = await http.start(self._config.host, self._config.http_port)
            self._http = http
        except ConfigError:
            await self.stop()
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._watch.run()), loop.create_task(self._keep_health())]
        _log.info("router %s: gRPC on port %d, HTTP on port %d", self._name, self.grpc_port, self.http_port)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once requests can run.

        Raises:
            NotReady: not within `timeout_s`; says what the cluster waits for.
        """
        await self.roster.wait_ready(timeout_s)

    async def drain(self) -> None:
        """Refuses new requests, lets running ones finish for `config.drain_s`, then ends the rest."""
        self._admission.close()
        await self._set_health()
        _log.info("router %s drains %d requests", self._name, self.num_active)
        if not await self._admission.wait_idle(self._config.drain_s):
            _log.warning("router %s ends %d requests after the drain time", self._name, self.num_active)
            await self._cut_requests()

    async def stop(self) -> None:
        """Ends what still runs and gives up ports, channels and tasks."""
        self._admission.close()
        await self._cut_requests()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self._grpc is not None:
            await self._grpc.stop(_STOP_S)
            self._grpc = None
        if self._http is not None:
            await self._http.stop()
            self._http = None
        await self._links.close()
        self.ledger.check_integrity()
        self._room.check_integrity()

    async def _start_grpc(self) -> int:
        # Clients are strangers: unlike between workers, a message has a limit here.
        options = {**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": _MAX_REQUEST_BYTES}
        server = grpc.aio.server(options=tuple(options.items()), interceptors=(RefuseMalformed(),))
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._config.grpc_port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            await server.stop(None)
            raise ConfigError(
                field="router.grpc_port", wanted=f"an address to listen on, {address}", given=str(error)
            ) from error
        await server.start()
        self._grpc = server
        return port

    async def _cut_requests(self) -> None:
        self._admission.cut_all()
        if not await self._admission.wait_idle(_STOP_S):
            _log.warning("router %s: %d requests did not end at once", self._name, self.num_active)

    def _on_snapshot(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        self.roster.update(snapshot)
        self._links.drop_absent(self.roster.view)
        self._runner.follow(self.roster.view)
        self._health_turn.set()
        self.metrics.gauge("snapshot_version").set(snapshot.version)
        for role in _ROLES:
            members = [member for member in snapshot.members if role_name(member.role) == role]
            num_ready = sum(member.is_ready for member in members)
            self.metrics.gauge("members", role=role, state="ready").set(num_ready)
            self.metrics.gauge("members", role=role, state="starting").set(len(members) - num_ready)

    async def _keep_health(self) -> None:
        while True:
            await self._health_turn.wait()
            self._health_turn.clear()
            await self._set_health()

    async def _set_health(self) -> None:
        states = health_pb2.HealthCheckResponse
        status = states.NOT_SERVING if self._waiting_for() else states.SERVING
        for service in ("", INFERENCE):
            await self._health.set(service, status)

    def _waiting_for(self) -> str:
        return "nothing: this router is shutting down" if self.is_draining else self.roster.view.waiting_for

    def _http_sources(self) -> HttpSources:
        return HttpSources(
            registry=self.metrics.registry, targets=self._targets, waiting_for=self._waiting_for
        )

    def _targets(self) -> list[TargetGroup]:
        host = f"[{self._advertise_host}]" if ":" in self._advertise_host else self._advertise_host
        return targets_of(
            self.roster.snapshot, router_name=self._name, router_address=f"{host}:{self.http_port}"
        )
