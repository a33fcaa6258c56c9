"""`moray drain`: attention workers leave a node that is about to go."""

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console

from cluster.client import drain as ask_drain
from cluster.local_state import controller_address


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Address, host name or Ray id of a node.")],
    controller: Annotated[str | None, typer.Option(help="host:port; else the newest here.")] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds to wait until it is done.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Has attention workers leave a node: they finish or hand over what runs, and start on other nodes."""
    address = controller_address(controller)
    worker_ids = asyncio.run(ask_drain(address, node, deadline_s=deadline_s))
    if as_json:
        typer.echo(json.dumps({"node": node, "worker_ids": worker_ids}))
    else:
        Console().print(f"{', '.join(worker_ids) or 'no attention workers'} left {node}")
