"""`moray scale`: another number of workers while it serves; `moray rebalance`: experts placed anew."""

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console

from cluster.client import rebalance as ask_rebalance
from cluster.client import scale as ask_scale
from cluster.local_state import controller_address
from wire.errors import ConfigError
from wire.proto import control_pb2

_Controller = Annotated[str | None, typer.Option(help="host:port; else the newest here.")]
_Deadline = Annotated[float, typer.Option(min=1, help="Seconds to wait until it is done.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def scale(
    experts: Annotated[int | None, typer.Option(min=1, help="Expert workers.")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers.")] = None,
    controller: _Controller = None,
    deadline_s: _Deadline = 600.0,
    as_json: _Json = False,
) -> None:
    """Changes how many workers a running cluster has; requests go on, and no answer changes."""
    wanted = {"expert": experts, "prefill": prefill, "decode": decode}
    sizes = {role: num for role, num in wanted.items() if num is not None}
    if not sizes:
        raise ConfigError(
            field="moray scale", wanted="--experts, --prefill or --decode", given="none of them"
        )
    address = controller_address(controller)
    version = 0
    with Console(stderr=True).status("scaling"):
        for role, num_workers in sizes.items():
            proto_role = control_pb2.Role.Value(f"ROLE_{role.upper()}")
            version = asyncio.run(ask_scale(address, proto_role, num_workers, deadline_s=deadline_s))
    if as_json:
        typer.echo(json.dumps({"num_workers": sizes, "table_version": version}))
    else:
        now = ", ".join(f"{num_workers} {role}" for role, num_workers in sizes.items())
        Console().print(f"{now} workers, routing table {version}")


def rebalance(
    force: Annotated[bool, typer.Option("--force", help="Move even if it is not worth it.")] = False,
    controller: _Controller = None,
    deadline_s: _Deadline = 600.0,
    as_json: _Json = False,
) -> None:
    """Places experts anew for the load of late, without a pause for anybody."""
    address = controller_address(controller)
    request = control_pb2.RebalanceRequest(force=force)
    with Console(stderr=True).status("rebalancing"):
        done = asyncio.run(ask_rebalance(address, request, deadline_s=deadline_s))
    if as_json:
        typer.echo(json.dumps({"num_moved": done.num_moved, "table_version": done.table_version}))
    else:
        Console().print(f"{done.num_moved} experts moved, routing table {done.table_version}")
