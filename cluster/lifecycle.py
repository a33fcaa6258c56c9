"""A cluster's life as seen by the process that starts it: check, start, wait until ready, stop.

Everything that can be refused is refused before Ray starts: config, checkpoint, slots, counts.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import find_actor, node_address
from cluster.client import shut_down
from cluster.config import MorayConfig
from cluster.controller_actor import ClusterStatus, ControllerActor, ControllerSpec
from cluster.models import ModelSource, find_model
from cluster.placement import slots_per_layer
from model.config import ModelConfig
from wire.errors import ConfigError, MorayError, NotReady, WorkerLost
from workers.attention.nixl_agent import check_installed
from workers.checkpoint import open_checkpoint

_CONTROLLER = "controller"
_POLL_S = 0.2
_LOCAL_STORE_BYTES = 80_000_000
"""Tokens never pass through Ray's object store; this is close to the least that Ray takes."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class CheckedModel:
    """A checkpoint whose headers have been read and found whole."""

    source: ModelSource
    config: ModelConfig
    fingerprint: str


def check_model(config: MorayConfig) -> CheckedModel:
    """The model that a config names, after every check that needs no weights.

    Raises:
        ConfigError: no such model, or too few expert slots for it.
        ModelBroken: a tensor is missing or misshapen; names it.
    """
    source = find_model(config.model)
    checkpoint = open_checkpoint(source.path)
    slots_per_layer(checkpoint.config.n_routed_experts, config.expert.replicas, config.expert.num_slots)
    return CheckedModel(source, checkpoint.config, checkpoint.fingerprint())


class Cluster:
    """A running cluster in Ray; made by `start_cluster`."""

    def __init__(self, controller: Any, *, address: str, is_local: bool, stop_s: float) -> None:
        self._controller = controller
        self.controller_address = address
        self._stop_s = stop_s
        self.is_local = is_local
        """Whether this process started Ray, and Ray ends with it."""
        self._ended = controller.wait_ended.remote()

    def wait_ready(self, *, deadline_s: float, on_progress: OnProgress) -> ClusterStatus:
        """Waits until every member is ready; `on_progress` hears several times a second what is missing.

        Raises:
            MorayError: an error that no restart mends, as its class.
            NotReady: the deadline passed; says what was still missing.
        """
        began_s = time.monotonic()
        while True:
            status = self._status()
            if status.fatal is not None:
                raise status.fatal
            if status.is_ready:
                return status
            if time.monotonic() - began_s > deadline_s:
                raise NotReady(f"not ready after {deadline_s:g} s; waiting for {status.waiting_for}")
            on_progress(status.waiting_for)
            if self.wait_ended(timeout_s=_POLL_S):
                raise WorkerLost("the controller ended before the cluster was ready")

    def _status(self) -> ClusterStatus:
        try:
            status: ClusterStatus = ray.get(self._controller.status.remote())
        except ray.exceptions.ActorUnavailableError:
            return ClusterStatus(waiting_for="the controller", is_ready=False, fatal=None, addresses={})
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"the controller is gone: {type(error).__name__}") from error
        return status

    def wait_ended(self, *, timeout_s: float) -> bool:
        """Whether the cluster was shut down by somebody; waits at most `timeout_s`."""
        done, _ = ray.wait([self._ended], timeout=timeout_s)
        if not done:
            return False
        try:
            ray.get(done)
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayError:
            # The controller's process died; Ray starts it again.
            self._ended = self._controller.wait_ended.remote()
            return False
        return True

    def stop(self) -> None:
        """Stops every member and the controller, and Ray if it was started here.

        The controller is asked over gRPC: Ray itself may be going down (a signal to the whole process group),
        and a call through it would wait a minute for that.
        """
        with contextlib.suppress(MorayError):
            asyncio.run(shut_down(self.controller_address, deadline_s=self._stop_s))
        if not self.is_local:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._controller)
        ray.shutdown()


def start_cluster(config: MorayConfig, model: CheckedModel) -> Cluster:
    """Starts or joins Ray and puts the controller into it; does not wait for the workers.

    Raises:
        ConfigError: a port is taken, a cluster of this name runs already, or a package is missing.
        NotReady: RAY_ADDRESS is set and nothing answers there.
    """
    if config.kv.transport == "nixl" and not os.environ.get("RAY_ADDRESS"):
        # Said before anything starts. Workers of other hosts have packages of their own.
        check_installed()
    if config.router.replicas and ":" not in config.router.host:
        _free_port(config.router.host, config.router.grpc_port, field="router.grpc_port")
        _free_port(config.router.host, config.router.http_port, field="router.http_port")
    is_local = join_ray(config.name)
    if not is_local and find_actor(_CONTROLLER, namespace=config.name) is not None:
        ray.shutdown()
        hint = "end it with `moray down`, or give this one another name in the config"
        raise ConfigError(
            field="name", wanted="a name not in use in this Ray cluster", given=config.name, hint=hint
        )
    host = node_address()
    address = f"{host}:{_free_port(host, config.controller.port, field='controller.port')}"
    spec = ControllerSpec(
        config=config,
        model=model.source,
        model_config=model.config,
        fingerprint=model.fingerprint,
        address=address,
        metrics_port=config.controller.metrics_port,
    )
    node_id = ray.get_runtime_context().get_node_id()
    controller = (
        ray.remote(ControllerActor)
        .options(
            name=_CONTROLLER,
            namespace=config.name,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=8,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(spec)
    )
    # A router drains, then workers get their grace.
    return Cluster(controller, address=address, is_local=is_local, stop_s=config.router.drain_s + 15)


def join_ray(namespace: str) -> bool:
    """Joins the Ray cluster at RAY_ADDRESS, or starts one on this host; True when it was started.

    Raises:
        NotReady: RAY_ADDRESS is set and nothing answers there.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        try:
            ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError) as error:
            raise NotReady(f"RAY_ADDRESS={address}: cannot join Ray there: {error}") from error
        return False
    # Ray turns token authentication on by itself where it finds a token file; this one needs none.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        namespace=namespace,
        include_dashboard=False,
        object_store_memory=_LOCAL_STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
    )
    return True


def _check_reachable(address: str) -> None:
    """Refuses an address where nobody listens at once; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        # "auto" and "local" are Ray's own words.
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        hint = "is `ray start --head` running there, and is this the port of its GCS (6379)?"
        raise NotReady(
            f"RAY_ADDRESS={address}: nobody answers ({error.strerror or error}); {hint}"
        ) from error


def _free_port(host: str, wanted: int, *, field: str) -> int:
    """`wanted`, or a free one when it is 0.

    Raises:
        ConfigError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            given = f"{wanted} ({error.strerror})"
            hint = "another cluster may run here: end it with `moray down`, or choose another port"
            raise ConfigError(field=field, wanted=f"a free port on {host}", given=given, hint=hint) from error
        port: int = probe.getsockname()[1]
        return port
