"""Takes calls of attention workers on the same host, by shared memory and a socket (wire/same_host.py)."""

import logging
import os
import socket
import threading
from collections.abc import Callable

from wire.errors import FrameInvalid, InternalError, MorayError
from wire.frames import Frame, decode_frame, frame_parts, is_body_summed
from wire.handshake import Handshake, check_handshake
from wire.same_host import (
    Block,
    Message,
    is_same_user,
    listen_local,
    receive,
    receive_handshake,
    send_message,
    send_text,
)
from workers.expert.forward_stream import Submit

_log = logging.getLogger(__name__)


class LocalServer:
    """Listens beside the gRPC server; one thread waits for connections, one serves each."""

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        submit: Submit,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """Listens on the socket that belongs to a gRPC address.

        Args:
            address: of the worker's gRPC server.
            handshake: what callers must say.
            submit: where calls go.
            on_thread: called by each connection's thread when it begins.

        Raises:
            OSError: no such sockets here, or another process has the name.
        """
        self._handshake = handshake
        self._submit = submit
        self._on_thread = on_thread
        self._listener = listen_local(address)
        self._connections: set[_Connection] = set()
        """Added to by the waiting thread, taken from by each connection's own."""
        self._waiting = threading.Thread(target=self._accept, name="experts-local", daemon=True)
        self._waiting.start()

    def close(self) -> None:
        """Ends every connection and every thread; the name is free afterwards."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._waiting.join()
        self._listener.close()
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return  # `close` has shut the listener down
            if not is_same_user(accepted):
                accepted.close()
                continue
            connection = _Connection(
                accepted,
                handshake=self._handshake,
                submit=self._submit,
                on_thread=self._on_thread,
                on_end=self._connections.discard,
            )
            self._connections.add(connection)
            connection.start()


class _Connection:
    """One attention worker's; its thread reads the calls, whoever computed an answer sends it."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        handshake: Handshake,
        submit: Submit,
        on_thread: Callable[[], None],
        on_end: "Callable[[_Connection], None]",
    ) -> None:
        self._socket = connection
        self._handshake = handshake
        self._submit = submit
        self._on_thread = on_thread
        self._on_end = on_end
        self._blocks: dict[int, Block] = {}
        self._sending = threading.Lock()
        self._is_open = True
        """Written under `_sending`; answers to a caller that has left are dropped."""
        self._thread = threading.Thread(target=self._run, name="experts-local", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        self._thread.start()

    def close(self) -> None:
        """Ends the connection and its thread."""
        self._end()
        self._thread.join()

    def _run(self) -> None:
        self._on_thread()
        try:
            check_handshake(self._handshake, receive_handshake(self._socket).items())
            while self._take_call():
                pass
        except MorayError as error:
            _log.warning("a caller on this host is refused: %s", error)
            self._tell(error)
        except OSError as error:
            _log.debug("a caller on this host has left: %s", error)
        finally:
            self._end()
            with self._sending:
                self._socket.close()
            self._on_end(self)

    def _take_call(self) -> bool:
        """Waits for one call and puts it into the queue; False at the end of the stream."""
        message, file = receive(self._socket)
        if not isinstance(message, Message):
            return False
        if file is not None:
            try:
                self._blocks[message.block_id] = Block.open(file, message)
            finally:
                os.close(file)
        block = self._blocks.get(message.block_id)
        if block is None:
            raise FrameInvalid(f"a call in block {message.block_id}, which never came")
        data = block.view(message.frame_bytes)
        frame, is_summed = decode_frame(data), is_body_summed(data)
        self._submit(frame, lambda answer: self._reply(answer, block, is_summed=is_summed))
        return True

    def _reply(self, answer: Frame, block: Block, *, is_summed: bool) -> None:
        """Puts the answer, summed as the call was, in its place; nothing is read there before the message."""
        parts = frame_parts(answer, is_summed=is_summed)
        num_bytes = sum(map(len, parts))
        if not block.write(parts, num_bytes=num_bytes):
            fault = InternalError(f"an answer of {num_bytes} bytes in a block of {block.num_bytes}")
            self._tell(fault)
            self._end()
            return
        message = Message(block.block_id, block.num_bytes, num_bytes)
        with self._sending:
            if not self._is_open:
                return
            try:
                send_message(self._socket, message)
            except OSError as error:
                _log.debug("a caller on this host has left or does not read: %s", error)
                self._shut()

    def _tell(self, error: MorayError) -> None:
        """The error that ends the connection, if the caller still listens."""
        with self._sending:
            if self._is_open:
                try:
                    send_text(self._socket, f"{type(error).__name__}: {error.message}")
                except OSError as gone:
                    _log.debug("a caller on this host has left: %s", gone)

    def _end(self) -> None:
        with self._sending:
            if self._is_open:
                self._shut()

    def _shut(self) -> None:
        self._is_open = False
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("a caller on this host has left: %s", error)
