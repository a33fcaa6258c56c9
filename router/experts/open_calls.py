"""The calls that one stream has open: numbers, futures, and what answers do to them."""

import itertools
import threading
from concurrent.futures import Future

import grpc

from wire.errors import FrameInvalid, HandshakeRefused, MorayError, WorkerLost, from_status
from wire.frames import Frame, FrameKind


class OpenCalls:
    """The open calls of a stream to one worker; opened by senders, answered by the stream's reader."""

    def __init__(self, name: str) -> None:
        """Takes the worker's name and address, for the text of errors."""
        self._name = name
        self._call_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Future[Frame]] = {}
        self._is_broken = False
        self._later: MorayError = WorkerLost(f"{name} is gone")
        """What calls on a broken stream are told."""

    @property
    def is_broken(self) -> bool:
        """Whether `fail` was called: the stream is gone and takes no calls."""
        return self._is_broken

    def open(self) -> "tuple[int, Future[Frame]]":
        """The number of a new call and the future of its answer, which on a broken stream has failed."""
        future: Future[Frame] = Future()
        call_id = next(self._call_ids)
        with self._lock:
            if not self._is_broken:
                self._open[call_id] = future
                return call_id, future
        future.set_exception(self._later)
        return call_id, future

    def resolve(self, frame: Frame) -> None:
        """Gives an answer to whom it belongs.

        Raises:
            FrameInvalid: no such call is open.
        """
        with self._lock:
            future = self._open.pop(frame.call_id, None)
        if future is None:
            raise FrameInvalid(f"{self._name} answered call {frame.call_id}, which is not open", field="call")
        if frame.kind is FrameKind.ERROR:
            future.set_exception(read_error(frame.meta.decode(errors="replace")))
        else:
            future.set_result(frame)

    def refuse(self, call_id: int, error: MorayError) -> None:
        """Fails one call, if it is still open."""
        with self._lock:
            future = self._open.pop(call_id, None)
        if future is not None:
            future.set_exception(error)

    def fail(self, error: MorayError) -> int:
        """Fails every open call, now and later; the number of those that were open.

        What a retry can mend becomes WorkerLost: the stream is gone, whatever was said last. A refused
        handshake is told to later calls too: it may come before the first, and no new stream mends it.
        """
        with self._lock:
            if isinstance(error, HandshakeRefused) and not self._is_broken:
                self._later = error
            self._is_broken = True
            pending = list(self._open.values())
            self._open.clear()
        is_lost = error.is_retryable or error.code is grpc.StatusCode.CANCELLED
        told = WorkerLost(f"{self._name}: {error.message}") if is_lost else error
        for future in pending:
            future.set_exception(told)
        return len(pending)


def read_error(text: str) -> MorayError:
    """The error that a worker reports as `ErrorName: message`."""
    name, _, message = text.partition(": ")
    return from_status(grpc.StatusCode.INTERNAL, message, (("moray-error", name),))
