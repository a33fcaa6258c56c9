"""Expert calls over torch.distributed: a group of two for each expert worker (torch_links.py)."""

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import replace

import grpc

from router.experts.open_calls import OpenCalls
from router.experts.torch_links import CALLER_RANK, FORM_S, Backend, PairPlace, TorchLinks, form_pair
from wire.errors import FrameInvalid, MorayError, WorkerLost, from_rpc
from wire.frames import Frame, decode_frame, encode_frame
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import expert_pb2, expert_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS

_log = logging.getLogger(__name__)
_END_S = 5.0
"""How long `close` waits for a worker to end its direction; a stopped one never does."""


class TorchPeer:
    """One pair; a thread forms it and sends, another receives, the first error fails all calls."""

    def __init__(
        self, worker_id: str, *, address: str, handshake: Handshake, metrics: Metrics, backend: Backend
    ) -> None:
        """Begins to form the pair, without waiting for the worker; calls wait for it."""
        self.address = address
        self._name = f"expert worker {worker_id} at {address}"
        self._handshake = handshake
        self._metrics = metrics
        self._backend = backend
        self._calls = OpenCalls(self._name)
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        """b"" is the last."""
        self._thread_name = f"experts-{worker_id}"
        self._sender = threading.Thread(target=self._send_all, name=self._thread_name, daemon=True)
        self._sender.start()

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
        """See Peer; a worker that does not end its direction is waited for a little."""
        self._calls.fail(WorkerLost("the transport was closed"))
        self._outbox.put(b"")
        self._sender.join(_END_S)

    def _send_all(self) -> None:
        """Forms the pair and sends what is in the outbox; returns when both directions have ended."""
        try:
            links = self._form()
        except MorayError as error:
            self._fail(error)
            return
        receiver = threading.Thread(
            target=self._receive_all, args=(links,), name=self._thread_name, daemon=True
        )
        receiver.start()
        try:
            data = None
            while data != b"":
                data = self._outbox.get()
                links.calls.send(data)
        except WorkerLost as error:
            self._fail(error)
        receiver.join(_END_S)

    def _form(self) -> TorchLinks:
        host = self.address.rpartition(":")[0].strip("[]")
        request = expert_pb2.JoinPairRequest(backend=self._backend)
        try:
            with grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                reply = expert_pb2_grpc.ExpertStub(channel).JoinPair(
                    request, metadata=self._handshake.to_metadata(), timeout=FORM_S
                )
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        place = PairPlace(
            rank=CALLER_RANK, store_host=host, store_port=reply.store_port, backend=self._backend
        )
        return form_pair(place)

    def _receive_all(self, links: TorchLinks) -> None:
        """Receives up to the end, even what is not looked at any more: nobody is to send in vain."""
        try:
            while data := links.answers.receive():
                if not self._calls.is_broken:
                    self._take(data)
            self._fail(WorkerLost("ended its stream"))
        except WorkerLost as error:
            self._fail(error)
        except FrameInvalid as error:
            self._drop(error)

    def _take(self, data: bytes) -> None:
        try:
            self._calls.resolve(decode_frame(data))
        except FrameInvalid as error:
            self._drop(error)

    def _drop(self, error: FrameInvalid) -> None:
        self._metrics.counter("dispatch_dropped_total", reason=error.field or "layout").inc()
        self._fail(error)

    def _fail(self, error: MorayError) -> None:
        if self._calls.fail(error):
            _log.warning("%s broke: %s", self._name, error)
