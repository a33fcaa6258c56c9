"""Expert workers that do as a test says, one a transport: answer, keep silent, lie, damage, hang up."""

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from router.experts.torch_links import WORKER_RANK, PairPlace, TorchLinks, form_pair, serve_store
from wire.frames import Frame, decode_frame, encode_frame
from wire.proto import expert_pb2, expert_pb2_grpc
from wire.rpc import EXPERT_FRAMES, SERVER_OPTIONS
from wire.same_host import Block, Message, listen_local, receive, receive_handshake, send_message

HOST = "127.0.0.1"
ANSWER_S = 20


class Link(Protocol):
    """The worker's end of one stream."""

    def answer(self, call: Frame, data: bytes) -> None:
        """Sends bytes as the answer to a call."""

    def end(self) -> None:
        """Sends nothing any more, but goes on reading."""

    def hang_up(self) -> None:
        """Ends the stream both ways."""


Behaviour = Callable[[Link, Frame], None]


class FakeWorker(Protocol):
    """A worker that listens; every call is shown to `behaviour`."""

    address: str

    def stop(self) -> None:
        """Ends every stream; the address is free afterwards."""


class GrpcFake:
    """One handler thread a stream reads; what is answered passes an outbox."""

    def __init__(self, behaviour: Behaviour, *, port: int = 0) -> None:
        self._behaviour = behaviour
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="fake")
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._forward)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(EXPERT_FRAMES, {"Forward": handler}),)
        )
        self.address = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:{port}')}"
        self._server.start()

    def _forward(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        link = _GrpcLink(context)
        reading = threading.Thread(target=self._read, args=(requests, link), daemon=True)
        reading.start()
        while (data := link.outbox.get()) is not None:
            yield data

    def _read(self, requests: Iterator[bytes], link: "_GrpcLink") -> None:
        try:
            for data in requests:
                self._behaviour(link, decode_frame(data))
        except grpc.RpcError:
            pass  # the caller has left
        finally:
            link.outbox.put(None)

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()


class _GrpcLink:
    def __init__(self, context: Any) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._context = context

    def answer(self, call: Frame, data: bytes) -> None:
        self.outbox.put(data)

    def end(self) -> None:
        self.outbox.put(None)

    def hang_up(self) -> None:
        self._context.cancel()


class LocalFake:
    """A socket of its own, with the name that belongs to an address on which nobody listens."""

    def __init__(self, behaviour: Behaviour, *, port: int = 0) -> None:
        self._behaviour = behaviour
        # A bound port that nobody listens on: unique, and gRPC finds nothing there.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((HOST, port))
        self.address = f"{HOST}:{self._reserved.getsockname()[1]}"
        self._listener = listen_local(self.address)
        self._links: list[_LocalLink] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            link = _LocalLink(connection)
            self._links.append(link)
            self._threads.append(threading.Thread(target=self._read, args=(link,), daemon=True))
            self._threads[-1].start()

    def _read(self, link: "_LocalLink") -> None:
        receive_handshake(link.socket)
        try:
            while (call := link.next_call()) is not None:
                self._behaviour(link, call)
        except OSError:
            pass  # the caller has left
        link.socket.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for link in self._links:
            link.hang_up()
        for thread in self._threads:
            thread.join()
        self._reserved.close()


class _LocalLink:
    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._blocks: dict[int, Block] = {}
        self._block_of: dict[int, Block] = {}

    def next_call(self) -> Frame | None:
        message, file = receive(self.socket)
        if not isinstance(message, Message):
            return None
        if file is not None:
            self._blocks[message.block_id] = Block.open(file, message)
            os.close(file)
        block = self._blocks[message.block_id]
        call = decode_frame(bytes(block.view(message.frame_bytes)))
        self._block_of[call.call_id] = block
        return call

    def answer(self, call: Frame, data: bytes) -> None:
        block = self._block_of[call.call_id]
        assert block.write([data], num_bytes=len(data))
        send_message(
            self.socket,
            Message(block_id=block.block_id, block_bytes=block.num_bytes, frame_bytes=len(data)),
        )

    def end(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it had ended
            self.socket.shutdown(socket.SHUT_RDWR)


class TorchFake(expert_pb2_grpc.ExpertServicer):
    """A pair for every caller that asks for one."""

    def __init__(self, behaviour: Behaviour, *, port: int = 0) -> None:
        self._behaviour = behaviour
        self._links: list[_TorchLink] = []
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fake")
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS)
        expert_pb2_grpc.add_ExpertServicer_to_server(self, self._server)
        self.address = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:{port}')}"
        self._server.start()

    def JoinPair(self, request: expert_pb2.JoinPairRequest, context: Any) -> expert_pb2.JoinPairReply:
        assert request.backend == "gloo"
        store = serve_store()
        threading.Thread(target=self._read, args=(store,), daemon=True).start()
        return expert_pb2.JoinPairReply(store_port=store.port)

    def _read(self, store: Any) -> None:
        place = PairPlace(rank=WORKER_RANK, store_host=HOST, store_port=store.port)
        link = _TorchLink(form_pair(place))
        self._links.append(link)
        while link.links is not None and (data := link.links.calls.receive()):
            self._behaviour(link, decode_frame(data))
        link.end()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()
        for link in self._links:
            link.end()
        self._links.clear()  # the server, in a cycle of its own, keeps this object


class _TorchLink:
    def __init__(self, links: TorchLinks) -> None:
        self.links: TorchLinks | None = links
        self._has_ended = False

    def answer(self, call: Frame, data: bytes) -> None:
        assert self.links is not None
        if not self._has_ended:  # nobody receives after the end: the send would never return
            self.links.answers.send(data)

    def end(self) -> None:
        if self.links is not None and not self._has_ended:
            self._has_ended = True
            self.links.answers.send(b"")

    def hang_up(self) -> None:
        self.links = None  # as a process that dies: its connections are closed


FAKES: dict[str, Callable[..., FakeWorker]] = {"grpc": GrpcFake, "local": LocalFake, "torch": TorchFake}


def answer(link: Link, call: Frame, reply: Frame) -> None:
    """Sends a frame as it is."""
    link.answer(call, encode_frame(reply))
