"""`moray status`: one view of the cluster, from its router."""

import asyncio
from datetime import datetime
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from cluster.client import InferenceClient
from cluster.local_state import router_address
from wire.proto import control_pb2


def status(
    address: Annotated[str | None, typer.Option(help="host:port of a router; else MORAY_ADDRESS.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole snapshot as JSON.")] = False,
) -> None:
    """Shows the members of the cluster and its routing table's version."""
    snapshot = asyncio.run(_fetch(router_address(address)))
    if as_json:
        typer.echo(
            MessageToJson(
                snapshot, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        )
        return
    console = Console()
    console.print(_table(snapshot))
    console.print(f"model {snapshot.model.name}, routing table {_table_line(snapshot)}")
    if snapshot.waiting_for:
        console.print(f"waiting for {snapshot.waiting_for}")


async def _fetch(address: str) -> control_pb2.ClusterSnapshot:
    async with InferenceClient(address) as client:
        return await client.cluster()


def _table_line(snapshot: control_pb2.ClusterSnapshot) -> str:
    if not snapshot.HasField("table"):
        return "none yet"
    since = _time(int(snapshot.table_unix_s))
    moving = f", {snapshot.num_loading} experts being loaded" if snapshot.num_loading else ""
    return f"{snapshot.table.version} since {since}{moving}"


def _state(member: control_pb2.Member, phase: str) -> str:
    if member.is_leaving:
        return "leaving"
    state = "ready" if member.is_ready else "not ready"
    role = control_pb2.Role.Name(member.role).removeprefix("ROLE_").lower()
    if phase:
        return f"{state}, for {phase}"
    return state if member.worker_id.startswith(role) else f"{state}, as {role}"


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S") if unix_s else ""


def _table(snapshot: control_pb2.ClusterSnapshot) -> Table:
    table = Table("member", "state", "address", "metrics", "node", "running since")
    for member in snapshot.members:
        table.add_row(
            member.worker_id,
            _state(member, snapshot.table.worker_phases.get(member.worker_id, "")),
            member.address,
            member.metrics_address,
            member.node.host,
            _time(member.incarnation),
        )
    return table
