"""Which transport carries a worker's calls: the same host's shared memory, gRPC or torch.distributed."""

import logging
import socket
from typing import Literal

from router.experts.grpc_transport import GrpcPeer
from router.experts.local_transport import LocalPeer
from router.experts.torch_links import Backend, check_backend
from router.experts.torch_transport import TorchPeer
from router.experts.transport import Peer, PeerTransport
from wire.errors import WorkerLost
from wire.handshake import Handshake
from wire.metrics import Metrics

_log = logging.getLogger(__name__)

TransportKind = Literal["auto", "grpc", "local", "torch"]


def make_transport(
    kind: TransportKind,
    handshake: Handshake,
    metrics: Metrics,
    *,
    local_checksum: bool = False,
    torch_backend: Backend = "gloo",
) -> PeerTransport:
    """The transport of an attention worker.

    Args:
        kind: auto = shared memory to workers on this host, gRPC to all others; local = shared memory to
            whoever listens on this host; both take gRPC where that cannot be had, and count it. torch = a
            group of torch.distributed with each worker.
        handshake: what the worker must agree with.
        metrics: of the attention worker.
        local_checksum: whether frames in shared memory have a checksum of their tensors, too.
        torch_backend: of the groups.

    Raises:
        ConfigError: the backend cannot be had here.
    """
    if kind == "torch":
        check_backend(torch_backend)
        return PeerTransport(
            lambda worker_id, address: TorchPeer(
                worker_id, address=address, handshake=handshake, metrics=metrics, backend=torch_backend
            )
        )
    return PeerTransport(_Connector(kind, handshake, metrics, local_checksum=local_checksum).connect)


class _Connector:
    """Makes the stream to a worker."""

    def __init__(
        self, kind: TransportKind, handshake: Handshake, metrics: Metrics, *, local_checksum: bool
    ) -> None:
        self._kind = kind
        self._local_checksum = local_checksum
        self._handshake = handshake
        self._metrics = metrics
        self._without_socket: set[str] = set()
        """Addresses that were logged; written by whoever connects, under the transport's lock."""

    def connect(self, worker_id: str, address: str) -> Peer:
        """A stream to one worker; with `local` every worker is tried as one of this host."""
        if self._kind == "grpc" or (self._kind == "auto" and not is_this_host(address)):
            return self._grpc(worker_id, address)
        try:
            return LocalPeer(
                worker_id,
                address=address,
                handshake=self._handshake,
                metrics=self._metrics,
                is_summed=self._local_checksum,
            )
        except WorkerLost as error:
            self._metrics.counter("dispatch_fallbacks_total").inc()
            if address not in self._without_socket:
                self._without_socket.add(address)
                _log.warning("%s is reached over gRPC: %s", worker_id, error)
            return self._grpc(worker_id, address)

    def _grpc(self, worker_id: str, address: str) -> Peer:
        return GrpcPeer(worker_id, address=address, handshake=self._handshake, metrics=self._metrics)


def is_this_host(address: str) -> bool:
    """Whether `host:port` names this host (in a container: this network namespace): its host can be bound."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, _, _, _, own = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(own)
    except OSError:
        return False
    return True
