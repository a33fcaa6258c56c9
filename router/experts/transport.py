"""What carries calls to expert workers; one interface, several implementations."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol

from wire.errors import WorkerLost
from wire.frames import Frame
from wire.proto import control_pb2


class ExpertTransport(Protocol):
    """Sends frames to expert workers and gives futures of their answers."""

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        """Starts one FORWARD call; does not block.

        Returns:
            A future of the PARTIAL frame. It fails with WorkerLost when the worker is gone or unknown, with
            FrameInvalid when its answer cannot be read, else with the error that the worker reported.
        """

    def close(self) -> None:
        """Ends every stream; open futures fail with WorkerLost."""


class Peer(Protocol):
    """One stream to one expert worker."""

    address: str
    """The worker's gRPC address, whatever the stream goes through."""

    @property
    def is_broken(self) -> bool:
        """Whether the stream has ended, for whatever reason."""

    def send(self, frame: Frame) -> "Future[Frame]":
        """Starts one call; see ExpertTransport."""

    def close(self) -> None:
        """Ends the stream and its threads; open futures fail with WorkerLost."""


class PeerTransport:
    """Streams to every expert worker of the newest snapshot.

    `update_members` is called by the thread that follows the controller, `send` by the engine thread.
    """

    def __init__(self, connect: Callable[[str, str], Peer]) -> None:
        """Takes what makes a stream out of (worker id, address); it must not wait for the worker."""
        self._connect = connect
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}

    def update_members(self, members: Iterable[control_pb2.Member]) -> None:
        """Connects to new expert workers and lets go of those that left or moved."""
        wanted = {m.worker_id: m.address for m in members if m.role == control_pb2.ROLE_EXPERT and m.address}
        with self._lock:
            gone = {name: peer for name, peer in self._peers.items() if wanted.get(name) != peer.address}
            for worker_id in gone:
                del self._peers[worker_id]
            for worker_id, address in wanted.items():
                if worker_id not in self._peers:
                    self._peers[worker_id] = self._connect(worker_id, address)
        for peer in gone.values():
            peer.close()

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        """Starts one call; see ExpertTransport."""
        broken = None
        with self._lock:
            peer = self._peers.get(worker_id)
            if peer is not None and peer.is_broken:
                # The worker may be alive behind a broken stream: every new call tries a new one.
                broken = peer
                peer = self._peers[worker_id] = self._connect(worker_id, peer.address)
        if broken is not None:
            broken.close()
        if peer is None:
            return unknown_worker(worker_id)
        return peer.send(frame)

    def close(self) -> None:
        """Ends every stream."""
        with self._lock:
            peers = list(self._peers.values())
            self._peers.clear()
        for peer in peers:
            peer.close()


def unknown_worker(worker_id: str) -> "Future[Frame]":
    """What a call to a worker that is not in the cluster gets."""
    future: Future[Frame] = Future()
    future.set_exception(WorkerLost(f"expert worker {worker_id} is not in the cluster now"))
    return future
