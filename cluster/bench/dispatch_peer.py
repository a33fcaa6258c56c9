"""The other process of `moray bench dispatch`: answers at once, without arithmetic, in every way measured.

    python -m cluster.bench.dispatch_peer MEMORY_FILE WAKE_SOCKET CPU STORE_PORT

The numbers are files that the caller opened (shared memory, a socket of messages), where to run, and where a
group of two ranks meets. Writes the addresses of its servers to stdout as a line of JSON, joins the group and
ends when its stdin does.
"""

import asyncio
import json
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import grpc.aio
import numpy as np

from wire.frames import Array, Frame, FrameKind
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import expert_pb2
from wire.rpc import SERVER_OPTIONS, Context
from workers.expert.call_queue import CallQueue
from workers.expert.forward_stream import ForwardStream
from workers.expert.local_server import LocalServer
from workers.expert.torch_server import TorchServer
from workers.expert.types import Reply

HOST = "127.0.0.1"
HANDSHAKE = Handshake(model="")
_EXPERT = expert_pb2.DESCRIPTOR.services_by_name["Expert"].full_name
PLAIN_METHOD = "/moray.bench.Plain/Stream"
WAKE = struct.Struct("<QQ")
"""Bytes that were copied into the shared memory, and bytes to copy back behind them."""
HALF_BYTES = 1 << 24
"""Of the shared memory: there, and back."""


def pairs_handler(ranks: TorchServer) -> grpc.GenericRpcHandler:
    """Forms groups of torch.distributed with whoever asks, as an expert worker does."""

    async def join(_request: expert_pb2.JoinPairRequest, _context: Context) -> expert_pb2.JoinPairReply:
        return expert_pb2.JoinPairReply(store_port=await asyncio.to_thread(ranks.join, "gloo"))

    handler = grpc.unary_unary_rpc_method_handler(
        join,
        request_deserializer=expert_pb2.JoinPairRequest.FromString,
        response_serializer=expert_pb2.JoinPairReply.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_EXPERT, {"JoinPair": handler})


class Answers:
    """Sums of the right shape, made once: FP8 rows are answered with as many bytes, others exactly."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], Array] = {}

    def __call__(self, frames: Sequence[Frame], reply: Reply) -> None:
        """One PARTIAL for each FORWARD."""
        for idx, frame in enumerate(frames):
            answer = Frame(
                kind=FrameKind.PARTIAL,
                tensors=(self._sums(frame.tensors[0]),),
                call_id=frame.call_id,
                table_version=frame.table_version,
                layer_idx=frame.layer_idx,
            )
            reply(idx, answer)

    def _sums(self, rows_RD: Array) -> Array:
        key = (rows_RD.dtype.name, rows_RD.shape)
        if key not in self._made:
            dtype = np.uint8 if rows_RD.dtype == np.uint8 else np.float64
            self._made[key] = np.ones(rows_RD.shape, dtype=dtype)
        return self._made[key]


def answer_wakes(memory: mmap.mmap, wake: socket.socket) -> None:
    """Copies as many bytes as it is asked for and wakes the caller, until the caller is gone."""
    view, own = memoryview(memory), memoryview(os.urandom(HALF_BYTES))
    while data := wake.recv(WAKE.size):
        _, back_bytes = WAKE.unpack(data)
        view[HALF_BYTES : HALF_BYTES + back_bytes] = own[:back_bytes]
        wake.send(data)


def start_plain() -> tuple[grpc.Server, str]:
    """A bidirectional stream without anything of Moray: the first 8 bytes of a message ask for a length."""
    own = os.urandom(HALF_BYTES)

    def stream(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        answers: dict[bytes, bytes] = {}
        for data in requests:
            if data[:8] not in answers:
                answers[data[:8]] = own[: int.from_bytes(data[:8], "little")]
            yield answers[data[:8]]

    server = grpc.server(ThreadPoolExecutor(2), options=SERVER_OPTIONS)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(stream)
    service, _, method = PLAIN_METHOD.removeprefix("/").partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    server.start()
    return server, address


async def serve(wait_end: Callable[[], object]) -> None:
    """Runs every server until `wait_end` returns."""
    queue = CallQueue(Answers(), start=lambda: None, metrics=Metrics("expert"))
    server = grpc.aio.server(options=SERVER_OPTIONS)
    frames = ForwardStream(HANDSHAKE, partial(queue.submit, may_compute=False))
    ranks = TorchServer(partial(queue.submit, may_compute=True))
    server.add_generic_rpc_handlers((frames.handler(), pairs_handler(ranks)))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    local = LocalServer(address, handshake=HANDSHAKE, submit=partial(queue.submit, may_compute=True))
    plain, plain_address = start_plain()
    sys.stdout.write(json.dumps({"worker": address, "plain": plain_address}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(wait_end)
    await asyncio.to_thread(ranks.close)
    plain.stop(None)
    await server.stop(None)
    await asyncio.to_thread(local.close)
    queue.close()


def main(memory_file: int, wake_file: int, cpu: int) -> None:
    """Serves until stdin ends."""
    os.sched_setaffinity(0, {cpu})
    memory = mmap.mmap(memory_file, 2 * HALF_BYTES)
    waking = threading.Thread(
        target=answer_wakes, args=(memory, socket.socket(fileno=wake_file)), daemon=True
    )
    waking.start()
    asyncio.run(serve(sys.stdin.read))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
