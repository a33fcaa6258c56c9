"""Expert calls over gRPC: one persistent bidirectional stream of raw frames to each worker."""

import itertools
import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import grpc

from wire.errors import FrameInvalid, MorayError, WorkerLost, from_rpc, from_status
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.handshake import Handshake
from wire.proto import control_pb2
from wire.rpc import CHANNEL_OPTIONS, FORWARD_METHOD

_log = logging.getLogger(__name__)


class GrpcExpertTransport:
    """Streams to every expert worker of the newest snapshot.

    `update_members` is called by the thread that follows the controller, `send` by the engine thread.
    """

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}

    def update_members(self, members: Iterable[control_pb2.Member]) -> None:
        """Connects to new expert workers and lets go of those that left or moved."""
        wanted = {m.worker_id: m.address for m in members if m.role == control_pb2.ROLE_EXPERT and m.address}
        with self._lock:
            gone = [peer for peer in self._peers.values() if wanted.get(peer.worker_id) != peer.address]
            for peer in gone:
                del self._peers[peer.worker_id]
            for worker_id, address in wanted.items():
                if worker_id not in self._peers:
                    self._peers[worker_id] = _Peer(worker_id, address=address, handshake=self._handshake)
        for peer in gone:
            peer.close()

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        """Starts one call; see ExpertTransport."""
        with self._lock:
            peer = self._peers.get(worker_id)
            if peer is not None and peer.is_broken:
                # The worker may be alive behind a broken stream: every new call tries a new one.
                peer = self._peers[worker_id] = _Peer(
                    worker_id, address=peer.address, handshake=self._handshake
                )
        if peer is None:
            return _failed(WorkerLost(f"expert worker {worker_id} is not in the cluster now"))
        return peer.send(frame)

    def close(self) -> None:
        """Ends every stream."""
        with self._lock:
            peers = list(self._peers.values())
            self._peers.clear()
        for peer in peers:
            peer.close()


class _Peer:
    """One stream; a reader thread resolves the futures, the first error fails them all."""

    def __init__(self, worker_id: str, *, address: str, handshake: Handshake) -> None:
        self.worker_id = worker_id
        self.address = address
        self.is_broken = False
        """Set by the reader thread when the stream ends."""
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Frame]] = {}
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        forward: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(FORWARD_METHOD)
        self._stream = forward(self._requests(), metadata=handshake.to_metadata())
        self._reader = threading.Thread(target=self._read, name=f"experts-{worker_id}", daemon=True)
        self._reader.start()

    def send(self, frame: Frame) -> "Future[Frame]":
        future: Future[Frame] = Future()
        with self._lock:
            if self.is_broken:
                return _failed(WorkerLost(f"expert worker {self.worker_id} at {self.address} is gone"))
            call_id = next(self._call_ids)
            self._pending[call_id] = future
        self._outbox.put(encode_frame(replace(frame, call_id=call_id)))
        return future

    def close(self) -> None:
        self._outbox.put(None)
        self._stream.cancel()
        self._reader.join()
        self._channel.close()

    def _requests(self) -> Iterator[bytes]:
        while (data := self._outbox.get()) is not None:
            yield data

    def _read(self) -> None:
        try:
            for data in self._stream:
                self._resolve(decode_frame(data))
            self._fail(WorkerLost(f"expert worker {self.worker_id} at {self.address} ended its stream"))
        except grpc.RpcError as error:
            self._fail(from_rpc(error))
        except FrameInvalid as error:
            self._fail(error)
        finally:
            # Ends the thread in which gRPC reads `_requests`, and the socket of a stream that broke.
            self._outbox.put(None)
            self._stream.cancel()

    def _resolve(self, frame: Frame) -> None:
        with self._lock:
            future = self._pending.pop(frame.call_id, None)
        if future is None:
            raise FrameInvalid(
                f"expert worker {self.worker_id} answered call {frame.call_id}, which is not open"
            )
        if frame.kind is FrameKind.ERROR:
            name, _, message = frame.meta.decode().partition(": ")
            future.set_exception(from_status(grpc.StatusCode.INTERNAL, message, (("moray-error", name),)))
        else:
            future.set_result(frame)

    def _fail(self, error: MorayError) -> None:
        with self._lock:
            self.is_broken = True
            pending = list(self._pending.values())
            self._pending.clear()
        if pending:
            _log.warning("stream to %s at %s broke: %s", self.worker_id, self.address, error)
        lost = WorkerLost(f"expert worker {self.worker_id} at {self.address}: {error.message}")
        for future in pending:
            future.set_exception(
                lost if error.is_retryable or error.code is grpc.StatusCode.CANCELLED else error
            )


def _failed(error: MorayError) -> "Future[Frame]":
    future: Future[Frame] = Future()
    future.set_exception(error)
    return future
