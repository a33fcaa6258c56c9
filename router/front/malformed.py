"""Bytes that are no request: refused as INVALID_ARGUMENT, like whatever else the caller can mend."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from wire.errors import InvalidRequest
from wire.rpc import Context, abort_with


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Answers an unreadable message with InvalidRequest; gRPC itself would call it an UNKNOWN error."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, with a deserializer that cannot fail."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        read = _tolerant(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _refusing_stream(handler.unary_stream), read, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _refusing_unary(handler.unary_unary), read, handler.response_serializer
        )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return InvalidRequest(f"request: wanted a protobuf message of moray.v1; {error}", field="request")

    return read


def _refusing_unary(method: Callable[..., Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        if isinstance(request, InvalidRequest):
            await abort_with(context, request)
        return await method(request, context)

    return call


def _refusing_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """Both ways to stream: gRPC's write style stays a coroutine, a generator stays a generator."""
    if inspect.iscoroutinefunction(method):
        return _refusing_unary(method)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, InvalidRequest):
            await abort_with(context, request)
        async for response in method(request, context):
            yield response

    return stream
