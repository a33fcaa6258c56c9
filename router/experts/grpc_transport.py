"""Expert calls over gRPC: one persistent bidirectional stream of raw frames to a worker."""

import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import grpc

from router.experts.open_calls import OpenCalls
from wire.errors import FrameInvalid, MorayError, WorkerLost, from_rpc
from wire.frames import Frame, decode_frame, encode_frame
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.rpc import CHANNEL_OPTIONS, FORWARD_METHOD

_log = logging.getLogger(__name__)


class GrpcPeer:
    """One stream; a reader thread resolves the futures, the first error fails them all."""

    def __init__(self, worker_id: str, *, address: str, handshake: Handshake, metrics: Metrics) -> None:
        self.address = address
        self._name = f"expert worker {worker_id} at {address}"
        self._metrics = metrics
        self._calls = OpenCalls(self._name)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        forward: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(FORWARD_METHOD)
        self._stream = forward(self._requests(), metadata=handshake.to_metadata())
        self._reader = threading.Thread(target=self._read, name=f"experts-{worker_id}", daemon=True)
        self._reader.start()

    @property
    def is_broken(self) -> bool:
        """See Peer."""
        return self._calls.is_broken

    def send(self, frame: Frame) -> "Future[Frame]":
        """See Peer."""
        call_id, future = self._calls.open()
        if not future.done():
            self._outbox.put(encode_frame(replace(frame, call_id=call_id)))
        return future

    def close(self) -> None:
        """See Peer."""
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
                self._calls.resolve(decode_frame(data))
            self._fail(WorkerLost("ended its stream"))
        except grpc.RpcError as error:
            self._fail(from_rpc(error))
        except FrameInvalid as error:
            self._metrics.counter("dispatch_dropped_total", reason=error.field or "layout").inc()
            self._fail(error)
        finally:
            # Ends the thread in which gRPC reads `_requests`, and the socket of a stream that broke.
            self._outbox.put(None)
            self._stream.cancel()

    def _fail(self, error: MorayError) -> None:
        if self._calls.fail(error):
            _log.warning("stream to %s broke: %s", self._name, error)
