"""How Moray's processes speak gRPC: channel options, raw-frame methods, errors mapped at the edge."""

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from wire.errors import InternalError, MorayError, to_trailers

_log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Peers are reached directly, whatever proxy the environment names for the world outside.
    ("grpc.enable_http_proxy", 0),
    # A channel of its own for every owner: closing one must not disturb another to the same address.
    ("grpc.use_local_subchannel_pool", 1),
)
"""For clients inside the cluster: tensors have no size limit, and a dead peer is noticed within 30 s."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers must never share a port in silence.
    ("grpc.so_reuseport", 0),
)

RECEIVED_KEY = "moray-received"
"""In the first metadata of a stream: a router has the request, though no token is there yet."""
EXPERT_FRAMES = "moray.v1.ExpertFrames"
ATTENTION_FRAMES = "moray.v1.AttentionFrames"
FORWARD_METHOD = f"/{EXPERT_FRAMES}/Forward"
PREFILL_METHOD = f"/{ATTENTION_FRAMES}/Prefill"
SCORE_METHOD = f"/{ATTENTION_FRAMES}/Score"

Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


async def abort_with(context: Context, error: MorayError) -> None:
    """Ends a call with an error of the tree; never returns normally."""
    await context.abort(error.code, error.message, to_trailers(error))


def unary_errors(
    method: Callable[[Any, _Request, Context], Awaitable[_Response]],
) -> Callable[[Any, _Request, Context], Awaitable[_Response]]:
    """A servicer method whose MorayErrors become statuses; anything else becomes InternalError, logged."""

    @functools.wraps(method)
    async def call(self: Any, request: _Request, context: Context) -> _Response:
        try:
            return await method(self, request, context)
        except MorayError as error:
            await abort_with(context, error)
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception as error:  # noqa: BLE001  the edge: mapped to InternalError and logged
            await abort_with(context, _unexpected(method.__qualname__, error))
        raise InternalError("abort returned")

    return call


def stream_errors(
    method: Callable[[Any, _Request, Context], AsyncIterator[_Response]],
) -> Callable[[Any, _Request, Context], AsyncIterator[_Response]]:
    """As `unary_errors`, for a method that streams its responses."""

    @functools.wraps(method)
    async def call(self: Any, request: _Request, context: Context) -> AsyncIterator[_Response]:
        responses = method(self, request, context)
        try:
            async for response in responses:
                yield response
        except MorayError as error:
            await abort_with(context, error)
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception as error:  # noqa: BLE001  the edge: mapped to InternalError and logged
            await abort_with(context, _unexpected(method.__qualname__, error))
        finally:
            await aclose(responses)

    return call


async def aclose(stream: AsyncIterator[Any]) -> None:
    """Ends an async generator now, so that its `finally` runs before the caller goes on."""
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


def _unexpected(where: str, error: Exception) -> InternalError:
    _log.exception("unexpected error in %s", where)
    return InternalError(f"{where}: {type(error).__name__}: {error}")
