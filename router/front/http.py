"""The HTTP side of the router: metrics, service discovery, probes."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.front.discovery import TargetGroup
from wire.errors import ConfigError

_PATHS = ("/metrics", "/sd", "/healthz", "/readyz")
_STOP_S = 2


@dataclass(frozen=True, kw_only=True)
class HttpSources:
    """Where the answers come from; called once a request."""

    registry: CollectorRegistry
    targets: Callable[[], list[TargetGroup]]
    waiting_for: Callable[[], str]
    """What is missing; "" = ready."""


def make_app(sources: HttpSources) -> Starlette:
    """The application."""

    async def index(_request: Request) -> Response:
        return JSONResponse({"service": "moray router", "paths": list(_PATHS)})

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(sources.registry), headers={"content-type": content_type})

    async def discovery(_request: Request) -> Response:
        return JSONResponse(sources.targets())

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(_request: Request) -> Response:
        missing = sources.waiting_for()
        status_code = 503 if missing else 200
        return JSONResponse({"ready": not missing, "waiting_for": missing}, status_code=status_code)

    endpoints = (metrics, discovery, healthz, readyz)
    routes = [Route(path, endpoint) for path, endpoint in zip(_PATHS, endpoints, strict=True)]
    return Starlette(routes=[Route("/", index), *routes])


class HttpServer:
    """uvicorn on the running loop, on a socket bound here; it installs no signal handlers."""

    def __init__(self, app: Starlette) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOP_S,
        )
        self._server = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port.

        Raises:
            ConfigError: the address cannot be bound; names router.http_port.
        """
        listener = _bind(host, port)
        try:
            port = int(listener.getsockname()[1])
            self._task = asyncio.get_running_loop().create_task(self._serve(listener))
            await self._server.is_up.wait()
        except BaseException:
            listener.close()
            raise
        return port

    async def _serve(self, listener: socket.socket) -> None:
        try:
            await self._server.serve(sockets=[listener])
        finally:
            # Whoever waits for the start must not wait for a server that failed.
            self._server.is_up.set()

    async def stop(self) -> None:
        """Ends every connection and closes the port."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _QuietServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, which belong to the process, and with a start event."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[Any]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            field="router.http_port", wanted=f"an address to listen on, {host}:{port}", given=str(error)
        ) from error
