"""Errors at the gRPC edge: a MorayError keeps its class, others become InternalError and are logged."""

import asyncio
import logging

import grpc
import pytest

from wire.errors import InvalidRequest
from wire.rpc import aclose, stream_errors, unary_errors


class Aborted(grpc.aio.AbortError):
    pass


class FakeContext:
    def __init__(self):
        self.aborted = None

    async def abort(self, code, message, trailers):
        self.aborted = (code, message, dict(trailers))
        raise Aborted


class Servicer:
    def __init__(self, error=None):
        self.error = error
        self.is_closed = False

    @unary_errors
    async def unary(self, request, context):
        if self.error:
            raise self.error
        return request + 1

    @stream_errors
    async def stream(self, request, context):
        try:
            for value in range(request):
                yield value
            if self.error:
                raise self.error
        finally:
            self.is_closed = True


async def call(servicer, method, context):
    if method == "unary":
        return await servicer.unary(1, context)
    return [value async for value in servicer.stream(3, context)]


@pytest.mark.parametrize(("method", "answer"), [("unary", 2), ("stream", [0, 1, 2])])
def test_answer_passes_through(method, answer):
    assert asyncio.run(call(Servicer(), method, FakeContext())) == answer


@pytest.mark.parametrize("method", ["unary", "stream"])
def test_moray_error_aborts_with_its_code_and_trailers(method):
    context = FakeContext()
    with pytest.raises(Aborted):
        asyncio.run(call(Servicer(InvalidRequest("bad", field="text")), method, context))
    code, message, trailers = context.aborted
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "bad")
    assert trailers == {"moray-error": "InvalidRequest", "moray-field": "text"}


@pytest.mark.parametrize("method", ["unary", "stream"])
def test_unexpected_error_is_internal_and_logged(method, caplog):
    context = FakeContext()
    with caplog.at_level(logging.ERROR), pytest.raises(Aborted):
        asyncio.run(call(Servicer(ZeroDivisionError("oops")), method, context))
    assert context.aborted[0] is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError: oops" in context.aborted[1]
    assert "unexpected error" in caplog.text


def test_stream_that_is_closed_early_ends_its_source():
    servicer = Servicer()

    async def main():
        stream = servicer.stream(3, FakeContext())
        await anext(stream)
        await aclose(stream)

    asyncio.run(main())
    assert servicer.is_closed


@pytest.mark.parametrize("method", ["unary", "stream"])
def test_cancellation_is_not_an_error(method):
    context = FakeContext()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call(Servicer(asyncio.CancelledError()), method, context))
    assert context.aborted is None
