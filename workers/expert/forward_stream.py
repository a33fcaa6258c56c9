"""FORWARD frames over gRPC: what an expert worker's stream of calls does, whoever computes the answers."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from wire.frames import Frame, decode_frame, encode_frame
from wire.handshake import Handshake, check_handshake
from wire.rpc import EXPERT_FRAMES, Context, stream_errors

Submit = Callable[[Frame, Callable[[Frame], None]], None]
"""Takes a call and what is to get its answer, which may be called on any thread."""


class ForwardStream:
    """The method that callers hold a stream to; answers each stream's calls one after another."""

    def __init__(self, handshake: Handshake, submit: Submit) -> None:
        self._handshake = handshake
        self._submit = submit

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given."""
        forward: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._forward)
        return grpc.method_handlers_generic_handler(EXPERT_FRAMES, {"Forward": forward})

    @stream_errors
    async def _forward(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        check_handshake(self._handshake, context.invocation_metadata() or ())
        loop = asyncio.get_running_loop()
        async for data in requests:
            answer: asyncio.Future[bytes] = loop.create_future()

            def reply(frame: Frame, answer: "asyncio.Future[bytes]" = answer) -> None:
                loop.call_soon_threadsafe(_set_result, answer, encode_frame(frame))

            self._submit(decode_frame(data), reply)
            yield await answer


def _set_result(future: "asyncio.Future[bytes]", data: bytes) -> None:
    """On the loop; a call that was cancelled meanwhile waits for nothing."""
    if not future.done():
        future.set_result(data)
