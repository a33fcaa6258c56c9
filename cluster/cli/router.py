"""`moray router`: a router outside Ray, as the Kubernetes Deployment runs it."""

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import MorayConfig, load_config
from cluster.logs import configure_logging
from cluster.models import find_model
from wire.errors import ConfigError


def router(
    controller: Annotated[str, typer.Option(help="host:port of the controller.")],
    config: Annotated[Path | None, typer.Option(help="YAML config file.")] = None,
) -> None:
    """Runs one router until SIGTERM, then lets running requests finish."""
    settings = load_config(config)
    name = socket.gethostname()
    configure_logging(settings.log_level, role="router", member_id=name)
    # A model in the box is made on this host too, for its tokenizer; a directory may be on the workers' only.
    with contextlib.suppress(ConfigError):
        find_model(settings.model)
    asyncio.run(_serve(settings, controller, name))


async def _serve(settings: MorayConfig, controller: str, name: str) -> None:
    # Imported here: a command that only asks needs no server.
    from router.front.service import RouterService

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host = os.environ.get("MORAY_POD_IP") or settings.router.host
    service = RouterService(settings.router, controller_address=controller, name=name, advertise_host=host)
    await service.start()
    await stop.wait()
    await service.drain()
    await service.stop()
