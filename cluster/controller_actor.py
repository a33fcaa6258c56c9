"""The controller's Ray actor: a thread with an asyncio loop, so that a restart needs nobody to start it."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from cluster.config import MorayConfig
from cluster.control.members import ELASTIC_ROLES, MemberState
from cluster.controller import Controller
from cluster.launcher import Launcher
from cluster.logs import configure_logging
from cluster.models import ModelSource
from cluster.placement import ExpertShape
from cluster.state import ClusterState
from cluster.topology.reader import make_topology_reader
from model.config import ModelConfig
from wire.errors import MorayError, NotReady
from wire.metrics import Metrics
from wire.proto import control_pb2

_FAREWELL_S = 1.0
_NICENESS = 19


@dataclass(frozen=True, kw_only=True)
class ControllerSpec:
    """What the controller is told at start; a restart gets the same."""

    config: MorayConfig
    model: ModelSource
    model_config: ModelConfig
    fingerprint: str
    address: str
    """host:port to listen on, and to be reached at."""
    metrics_port: int


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """What `moray up` shows."""

    waiting_for: str
    is_ready: bool
    fatal: MorayError | None
    addresses: dict[str, str]
    """Worker id -> host:port, of those that can be reached."""


class ControllerActor:
    """Runs a Controller; its methods are called from Ray's threads."""

    def __init__(self, spec: ControllerSpec) -> None:
        configure_logging(spec.config.log_level, role="controller", member_id="controller")
        # Planning must not take a processor from those who compute tokens.
        os.nice(_NICENESS)
        self._spec = spec
        self._controller: Controller | None = None
        self._ended = threading.Event()
        self._failure: MorayError | None = None
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def status(self) -> ClusterStatus:
        """How far the cluster is."""
        if self._controller is None:
            return ClusterStatus(
                waiting_for="the controller", is_ready=False, fatal=self._failure, addresses={}
            )
        state = self._controller.state
        waiting_for = state.waiting_for()
        return ClusterStatus(
            waiting_for=waiting_for,
            is_ready=not waiting_for,
            fatal=self._controller.fatal or self._failure,
            addresses={m.worker_id: m.address for m in state.members() if m.address},
        )

    def wait_ended(self) -> None:
        """Returns when the cluster was shut down."""
        self._ended.wait()

    def _run(self) -> None:
        try:
            asyncio.run(_serve(self._spec, self._on_made))
        except RuntimeError as error:
            self._failure = NotReady(f"controller at {self._spec.address}: {error}")
        self._ended.set()
        if self._failure is None:
            # Whoever waits hears of the end first; a detached actor would live on for nothing.
            time.sleep(_FAREWELL_S)
            ray.kill(ray.get_runtime_context().current_actor)

    def _on_made(self, controller: Controller) -> None:
        self._controller = controller


# Not a method: one coroutine method would make Ray run every method on one loop, where they would block it.
async def _serve(spec: ControllerSpec, on_made: Callable[[Controller], None]) -> None:
    host = spec.address.rsplit(":", 1)[0]
    metrics = Metrics("controller")
    metrics_port = metrics.serve(host, spec.metrics_port)
    launcher = Launcher(
        spec.config, controller_address=spec.address, topology=make_topology_reader(spec.config.topology)
    )
    controller = Controller(
        spec.config,
        state=make_state(spec, metrics_address=f"{host}:{metrics_port}"),
        launcher=launcher,
        fingerprint=spec.fingerprint,
        metrics=metrics,
    )
    on_made(controller)
    await controller.run(spec.address)


def make_state(spec: ControllerSpec, *, metrics_address: str) -> ClusterState:
    """The state in which nothing but the controller is there yet."""
    config, model_config = spec.config, spec.model_config
    me = MemberState(
        worker_id="controller",
        role="controller",
        address=spec.address,
        metrics_address=metrics_address,
        incarnation=int(time.time()),
        is_ready=True,
    )
    groups = {role: getattr(config, role).replicas for role in (*ELASTIC_ROLES, "router")}
    members = [
        MemberState(worker_id=f"{role}-{i}", role=role)
        for role, count in groups.items()
        for i in range(count)
    ]
    return ClusterState(
        [me, *members],
        model=control_pb2.ModelInfo(
            name=spec.model.name,
            path=str(spec.model.path),
            fingerprint=spec.fingerprint,
            vocab_tokens=model_config.vocab_size,
            max_context_tokens=model_config.max_position_embeddings,
            bos_token_id=model_config.bos_token_id,
            eos_token_id=model_config.eos_token_id,
        ),
        shape=ExpertShape(
            num_experts=model_config.n_routed_experts, layer_ids=tuple(model_config.expert_layer_ids)
        ),
        num_slots=config.expert.num_slots,
        page_tokens=config.kv.page_tokens,
    )
