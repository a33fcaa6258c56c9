"""Expert calls to a worker on the same host: shared memory and a Unix socket (wire/same_host.py)."""

import itertools
import logging
import os
import socket
import threading
import weakref
from collections import deque
from concurrent.futures import Future

import numpy as np

from router.experts.open_calls import OpenCalls, read_error
from router.experts.payload import max_reply_bytes
from wire.errors import FrameInvalid, MorayError, Overloaded, WorkerLost
from wire.frames import Frame, decode_frame, frame_parts
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.same_host import Block, Message, connect_local, create_block, receive, send_message

_log = logging.getLogger(__name__)

_MIN_BYTES = 1 << 16
"""Of a block; larger ones are powers of two, so that calls of about one size share them."""


class LocalPeer:
    """One connection; a reader thread resolves the futures, the first error fails them all."""

    def __init__(
        self, worker_id: str, *, address: str, handshake: Handshake, metrics: Metrics, is_summed: bool = False
    ) -> None:
        """Connects, without waiting for the worker.

        Args:
            worker_id: the worker.
            address: of its gRPC server.
            handshake: what it must agree with.
            metrics: of the attention worker.
            is_summed: whether checksums cover the tensors of calls, and so of answers, too.

        Raises:
            WorkerLost: no such worker is on this host.
        """
        self.address = address
        self._is_summed = is_summed
        self._name = f"expert worker {worker_id} at {address}"
        self._metrics = metrics
        self._calls = OpenCalls(self._name)
        self._blocks = _Blocks()
        self._sending = threading.Lock()
        self._socket = connect_local(address, handshake)
        self._reader = threading.Thread(target=self._read, name=f"experts-{worker_id}", daemon=True)
        self._reader.start()

    @property
    def is_broken(self) -> bool:
        """See Peer."""
        return self._calls.is_broken

    def send(self, frame: Frame) -> "Future[Frame]":
        """See Peer. Writes the frame on the calling thread."""
        call_id, future = self._calls.open()
        if future.done():
            return future
        parts = frame_parts(frame, call_id=call_id, is_summed=self._is_summed)
        num_bytes = sum(map(len, parts))
        block, file = self._blocks.take(max(num_bytes, max_reply_bytes(frame)))
        block.write(parts, num_bytes=num_bytes)
        message = Message(block.block_id, block.num_bytes, num_bytes)
        try:
            with self._sending:
                send_message(self._socket, message, file=file)
        except BlockingIOError:
            self._blocks.drop(block, is_new=file is not None)
            self._calls.refuse(call_id, Overloaded(f"{self._name} has not read its last calls"))
        except OSError as error:
            # The reader finds out why, and fails this call with all others.
            _log.debug("%s is gone: %s", self._name, error)
        finally:
            if file is not None:
                os.close(file)
        return future

    def close(self) -> None:
        """See Peer."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("%s had ended already: %s", self._name, error)
        self._reader.join()

    def _read(self) -> None:
        try:
            while isinstance(got := receive(self._socket)[0], Message):
                self._calls.resolve(decode_frame(self._blocks.lease(got)))
            self._fail(WorkerLost("ended its stream") if got is None else read_error(got))
        except FrameInvalid as error:
            self._metrics.counter("dispatch_dropped_total", reason=error.field or "layout").inc()
            self._fail(error)
        except OSError as error:
            self._fail(WorkerLost(str(error)))
        finally:
            with self._sending:
                self._socket.close()

    def _fail(self, error: MorayError) -> None:
        if self._calls.fail(error):
            _log.warning("stream to %s broke: %s", self._name, error)


class _Blocks:
    """The blocks of one connection: in a call, leased to the readers of its answer, or free.

    `take` and `drop` are called by senders, `lease` by the reader, `_give_back` by whoever lets go of an
    answer, perhaps a garbage collection: each step is one operation of a dict or a deque and needs no lock.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._free: dict[int, deque[Block]] = {}
        self._called: dict[int, Block] = {}
        self._leases: dict[int, weakref.ref[np.ndarray]] = {}
        """What tells that an answer has no reader any more."""

    def take(self, min_bytes: int) -> tuple[Block, int | None]:
        """A free block, or a new one and its file."""
        num_bytes = max(_MIN_BYTES, 1 << (min_bytes - 1).bit_length())
        file = None
        try:
            block = self._free[num_bytes].pop()
        except (KeyError, IndexError):
            block, file = create_block(next(self._ids), num_bytes=num_bytes)
        self._called[block.block_id] = block
        return block, file

    def drop(self, block: Block, *, is_new: bool) -> None:
        """Takes back a block whose call was not sent; the other side has never heard of a new one."""
        del self._called[block.block_id]
        if not is_new:
            self._give_back(block)

    def lease(self, message: Message) -> memoryview:
        """The answer's bytes; when nobody has a view of them any more, the block is free.

        Raises:
            FrameInvalid: no call has that block, or it is smaller.
        """
        block = self._called.pop(message.block_id, None)
        if block is None:
            raise FrameInvalid(f"an answer in block {message.block_id}, which has no open call", field="call")
        owner = np.frombuffer(block.view(message.frame_bytes), dtype=np.uint8)
        self._leases[block.block_id] = weakref.ref(owner, lambda _: self._give_back(block))
        return owner.data

    def _give_back(self, block: Block) -> None:
        self._leases.pop(block.block_id, None)
        self._free.setdefault(block.num_bytes, deque()).append(block)
