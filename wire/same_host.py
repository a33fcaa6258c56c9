"""How two processes of one host pass frames: shared memory for the bytes, a Unix socket to say where.

The caller owns the memory: a *block* holds one call's frame and then its answer, and is free again when
nobody reads the answer any more. A block is known to the other side from the first call that uses it, whose
message brings its file. Messages are 24 bytes of a SOCK_SEQPACKET socket: each arrives whole, waiting for one
does not spin, and a peer that dies ends the stream at once. The socket's name, in Linux's abstract namespace,
follows from the worker's gRPC address: there is nothing to announce and nothing left behind.
"""

import json
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from wire.errors import FrameInvalid, HandshakeRefused, WorkerLost
from wire.frames import Part
from wire.handshake import Handshake

_MESSAGE = struct.Struct("<4sIQQ")
_CALL, _TEXT = b"CALL", b"TEXT"
_FILE = struct.Struct("i")
_FILE_SPACE = socket.CMSG_LEN(_FILE.size)
_CREDENTIALS = struct.Struct("3i")
_MAX_TEXT_BYTES = 8192


class Message(NamedTuple):
    """One call or answer: where its frame lies."""

    block_id: int
    """Chosen by the caller, its own in each connection."""
    block_bytes: int
    frame_bytes: int


_MAP_FLAGS = mmap.MAP_SHARED | mmap.MAP_POPULATE


class Block:
    """A piece of memory that both processes see."""

    def __init__(self, memory: mmap.mmap, *, block_id: int) -> None:
        self.block_id = block_id
        self.memory = memory
        self.num_bytes = len(memory)
        self._view = memoryview(memory)

    @classmethod
    def open(cls, file: int, message: Message) -> "Block":
        """The block of a caller, out of the file that came with its first message.

        Raises:
            FrameInvalid: the file is smaller than the message says.
        """
        if os.fstat(file).st_size < message.block_bytes or not message.block_bytes:
            raise FrameInvalid(f"a block's file is smaller than its {message.block_bytes} bytes")
        return cls(mmap.mmap(file, message.block_bytes, flags=_MAP_FLAGS), block_id=message.block_id)

    def write(self, parts: Iterable[Part], *, num_bytes: int) -> bool:
        """Puts a frame into the block; False when it does not fit."""
        if num_bytes > self.num_bytes:
            return False
        begin = 0
        for part in parts:
            end = begin + len(part)
            self._view[begin:end] = part
            begin = end
        return True

    def view(self, num_bytes: int) -> memoryview:
        """The first bytes of the block.

        Raises:
            FrameInvalid: it has fewer.
        """
        if num_bytes > self.num_bytes:
            raise FrameInvalid(f"a frame of {num_bytes} bytes in a block of {self.num_bytes}")
        return self._view[:num_bytes]


def create_block(block_id: int, *, num_bytes: int) -> tuple[Block, int]:
    """A new block and its file, which the caller closes when it was sent."""
    file = os.memfd_create("moray-call")
    os.ftruncate(file, num_bytes)
    return Block(mmap.mmap(file, num_bytes, flags=_MAP_FLAGS), block_id=block_id), file


def socket_name(address: str) -> bytes:
    """Abstract name of the socket of the worker at this gRPC address."""
    return f"\0moray-expert-{address}".encode()


def listen_local(address: str) -> socket.socket:
    """The socket on which the worker at this gRPC address takes calls from its own host.

    Raises:
        OSError: no such sockets here, or another process has the name.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(socket_name(address))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def connect_local(address: str, handshake: Handshake) -> socket.socket:
    """A connection to the worker at this gRPC address, if it is on this host; never waits for it.

    Raises:
        WorkerLost: no process of this user listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(socket_name(address))
        if not is_same_user(connection):
            raise WorkerLost(f"the socket of {address} belongs to another user")
        connection.setblocking(True)
        connection.send(json.dumps(dict(handshake.to_metadata())).encode())
    except (OSError, WorkerLost) as error:
        connection.close()
        raise WorkerLost(f"no socket of {address} on this host: {error}") from None
    return connection


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this one's user."""
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(given)[1] == os.getuid())


def receive_handshake(connection: socket.socket) -> Mapping[str, str]:
    """The metadata that a caller sends first.

    Raises:
        HandshakeRefused: something else came.
    """
    text = connection.recv(_MAX_TEXT_BYTES)
    try:
        given = json.loads(text)
        return {str(key): str(value) for key, value in given.items()}
    except (ValueError, AttributeError) as error:
        raise HandshakeRefused(f"handshake: {text[:40]!r} is not one: {error}") from None


def send_message(connection: socket.socket, message: Message, *, file: int | None = None) -> None:
    """Sends where a frame lies, with the file of a new block; does not block.

    Raises:
        BlockingIOError: the other side has not read so many messages that no more fit.
        OSError: the connection is gone.
    """
    data = _MESSAGE.pack(_CALL, message.block_id, message.block_bytes, message.frame_bytes)
    if file is None:
        connection.send(data, socket.MSG_DONTWAIT)
    else:
        with_file = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FILE.pack(file))
        connection.sendmsg([data], [with_file], socket.MSG_DONTWAIT)


def send_text(connection: socket.socket, text: str) -> None:
    """Sends an error in words, after which the sender ends the connection; does not block."""
    connection.send(_TEXT + text.encode()[: _MAX_TEXT_BYTES - len(_TEXT)], socket.MSG_DONTWAIT)


def receive(connection: socket.socket) -> tuple[Message | str | None, int | None]:
    """Waits for the next message, or for the text of an error, or None at the end; and the file that came.

    Raises:
        FrameInvalid: it is neither.
        OSError: the connection is gone.
    """
    try:
        data, file = _receive_data(connection)
    except ConnectionResetError:
        # The other side left while messages to it were unread; what it said last still lies here.
        data, file = _receive_data(connection)
    if not data:
        return None, file
    if data[:4] == _CALL and len(data) == _MESSAGE.size:
        _, block_id, block_bytes, frame_bytes = _MESSAGE.unpack(data)
        return Message(block_id, block_bytes, frame_bytes), file
    if data[:4] == _TEXT:
        return data[4:].decode(errors="replace"), file
    raise FrameInvalid(f"a message of {len(data)} bytes is none of the same-host transport", field="layout")


def _receive_data(connection: socket.socket) -> tuple[bytes, int | None]:
    """One message and the file that it brought."""
    data, brought, _, _ = connection.recvmsg(_MAX_TEXT_BYTES, _FILE_SPACE, socket.MSG_CMSG_CLOEXEC)
    return data, _FILE.unpack(brought[0][2])[0] if brought else None
