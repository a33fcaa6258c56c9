"""`moray role`: an attention worker works in another role while it serves."""

import asyncio
import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from cluster.client import set_role
from cluster.local_state import controller_address
from wire.proto import control_pb2


class AttentionRole(StrEnum):
    """What an attention worker can do."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


def role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker id, such as decode-1.")],
    new_role: Annotated[AttentionRole, typer.Argument(metavar="ROLE", help="prefill, decode or both.")],
    controller: Annotated[str | None, typer.Option(help="host:port; else the newest here.")] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds to wait until it is done.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Has an attention worker prefill, decode, or do both; requests go on, and no answer changes."""
    proto_role = control_pb2.Role.Value(f"ROLE_{new_role.name}")
    address = controller_address(controller)
    version = asyncio.run(set_role(address, worker, proto_role, deadline_s=deadline_s))
    if as_json:
        typer.echo(json.dumps({"worker_id": worker, "role": new_role.value, "snapshot_version": version}))
    else:
        Console().print(f"{worker} works as {new_role.value}")
