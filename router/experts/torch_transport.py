"""Expert calls to the ranks of a static group, over torch.distributed (torch_links.py)."""

import logging
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

from router.experts.open_calls import OpenCalls
from router.experts.torch_links import TorchLinks
from router.experts.transport import unknown_worker
from wire.errors import FrameInvalid, MorayError, WorkerLost
from wire.frames import Frame, decode_frame, encode_frame
from wire.metrics import Metrics

_log = logging.getLogger(__name__)
_END_S = 5.0
"""How long `close` waits for a worker to end its direction; a stopped one never does."""


class TorchExpertTransport:
    """Calls to every expert worker of a group that was formed before; a worker that is lost stays lost."""

    def __init__(self, links: TorchLinks, *, ranks: Mapping[str, int], metrics: Metrics) -> None:
        """Takes this process's links and the rank of each expert worker."""
        self._peers = {
            worker_id: _TorchPeer(worker_id, rank=rank, links=links, metrics=metrics)
            for worker_id, rank in ranks.items()
        }

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        """Starts one call; see ExpertTransport."""
        peer = self._peers.get(worker_id)
        if peer is None:
            return unknown_worker(worker_id)
        return peer.send(frame)

    def close(self) -> None:
        """Ends every direction; open futures fail with WorkerLost."""
        for peer in self._peers.values():
            peer.close()


class _TorchPeer:
    """One rank; a thread sends, another receives, the first error fails all calls."""

    def __init__(self, worker_id: str, *, rank: int, links: TorchLinks, metrics: Metrics) -> None:
        self._name = f"expert worker {worker_id} at rank {rank}"
        self._rank = rank
        self._links = links
        self._metrics = metrics
        self._calls = OpenCalls(self._name)
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=f"experts-{worker_id}", daemon=True)
            for run in (self._send_all, self._receive_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, frame: Frame) -> "Future[Frame]":
        call_id, future = self._calls.open()
        if not future.done():
            self._outbox.put(encode_frame(replace(frame, call_id=call_id)))
        return future

    def close(self) -> None:
        self._calls.fail(WorkerLost("the transport was closed"))
        self._outbox.put(b"")
        for thread in self._threads:
            thread.join(_END_S)

    def _send_all(self) -> None:
        """Sends what is in the outbox; b"" is the last."""
        try:
            data = None
            while data != b"":
                data = self._outbox.get()
                self._links.calls.send(self._rank, data)
        except WorkerLost as error:
            self._fail(error)

    def _receive_all(self) -> None:
        """Receives up to the end, even what is not looked at any more: nobody is to send in vain."""
        try:
            while data := self._links.answers.receive(self._rank):
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
