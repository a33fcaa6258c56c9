"""`moray balance`: which expert gets how many replicas and where, from loads in a file."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.balance_phases import balance_phases, show_phases
from wire.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

    from cluster.balance.types import Fleet, Floats, Ints

Report = Mapping[str, Any]


def balance(  # noqa: PLR0913, PLR0917 - one parameter a flag
    loads: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="numpy file: load per layer and expert.")
    ],
    workers: Annotated[int, typer.Option(min=1, help="Expert workers.")],
    slots: Annotated[int, typer.Option(min=1, help="Slots of each worker in each layer.")],
    out: Annotated[Path, typer.Option(help='File to write {"phy2log": ...} to.')],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; replicas spread over them.")] = 1,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Groups of experts, each kept on one node if nodes divide them.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Plan in force; few copies move from it.")
    ] = None,
    by_phase: Annotated[
        bool,
        typer.Option("--by-phase", help="Loads are (2, layers, experts), prefill first: a plan for each."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Plan the replicas of every expert and their workers; say how level it is and what moves."""
    from cluster.balance.inputs import check_capacity, check_loads, plan_from_lists

    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(field="--out", wanted="a file in a directory that can be written", given=str(out))
    if by_phase:
        if groups is not None:
            raise ConfigError(field="--groups", wanted="none with --by-phase", given=str(groups))
        fleet = _fleet((workers, slots), nodes)
        before = None if previous is None else _read_plan(previous)
        plan, found = balance_phases(_read_array(loads), fleet, num_nodes=nodes, previous=before)
        out.write_text(json.dumps(plan))
        report = {"out": str(out), **found}
        typer.echo(json.dumps(report)) if as_json else show_phases(report)
        return
    loads_LE = check_loads(_read_array(loads))
    num_layers, num_experts = loads_LE.shape
    check_capacity(num_experts, num_workers=workers, num_nodes=nodes, num_slots=slots)
    previous_LWX = None
    if previous is not None:
        previous_LWX = plan_from_lists(
            _read_plan(previous)["phy2log"],
            num_layers=num_layers,
            num_experts=num_experts,
            fleet_shape=(workers, slots),
        )
    began_s = time.perf_counter()
    plan_LWX, is_grouped = _plan(loads_LE, (workers, slots), nodes, groups, previous_LWX)
    took_s = time.perf_counter() - began_s
    out.write_text(json.dumps({"phy2log": plan_LWX.reshape(num_layers, -1).tolist()}))
    report = {
        "out": str(out),
        "policy": "groups on nodes" if is_grouped else "global",
        **_measure(loads_LE, plan_LWX, previous_LWX),
        "plan_s": took_s,
    }
    typer.echo(json.dumps(report)) if as_json else _show(report)


def _fleet(fleet_shape: tuple[int, int], num_nodes: int) -> "Fleet":
    import numpy as np

    from cluster.balance.types import Fleet

    num_workers, num_slots = fleet_shape
    return Fleet(num_slots=num_slots, domain_W=np.arange(num_workers) // (num_workers // num_nodes))


def _plan(
    loads_LE: "Floats",
    fleet_shape: tuple[int, int],
    num_nodes: int,
    num_groups: int | None,
    previous_LWX: "Ints | None",
) -> "tuple[Ints, bool]":
    """(L, W, X) plan, and whether groups stay on nodes: with several nodes that share the groups evenly."""
    from cluster.balance.grouped import Nodes, plan_grouped
    from cluster.balance.homes import plan_homes
    from cluster.balance.inputs import check_groups

    num_workers, num_slots = fleet_shape
    if num_groups is None or num_nodes == 1 or num_groups % num_nodes:
        fleet = _fleet(fleet_shape, num_nodes)
        return plan_homes(loads_LE, fleet, previous_LWX=previous_LWX), False
    check_groups(loads_LE.shape[1], num_groups=num_groups, num_nodes=num_nodes, num_slots=num_slots)
    nodes = Nodes(num_nodes=num_nodes, num_workers=num_workers, num_slots=num_slots, num_groups=num_groups)
    return plan_grouped(loads_LE, nodes, previous_LWX=previous_LWX), True


def _measure(loads_LE: "Floats", plan_LWX: "Ints", previous_LWX: "Ints | None") -> Report:
    """Balance before and after, and the copies that move."""
    from cluster.balance.measure import count_moves, count_replicas, levelness, worker_loads
    from cluster.balance.shares import plan_shares

    num_experts = loads_LE.shape[1]
    before = None
    if previous_LWX is not None and (count_replicas(previous_LWX, num_experts) > 0).all():
        before = levelness(worker_loads(loads_LE, previous_LWX))
    share_LWX = plan_shares(loads_LE, plan_LWX)
    shared_LW = _loads_with_shares(loads_LE, plan_LWX, share_LWX)
    moved = None if previous_LWX is None else count_moves(previous_LWX, plan_LWX, num_experts)
    return {
        "layers": len(loads_LE),
        "experts": num_experts,
        "workers": plan_LWX.shape[1],
        "slots": plan_LWX.shape[1] * plan_LWX.shape[2],
        "balance_before": before,
        "balance": levelness(worker_loads(loads_LE, plan_LWX)),
        "balance_with_shares": levelness(shared_LW),
        "most_replicas": int(count_replicas(plan_LWX, num_experts).max()),
        "moved_copies": moved,
        "moved_share": None if moved is None else moved / plan_LWX.size,
    }


def _loads_with_shares(loads_LE: "Floats", plan_LWX: "Ints", share_LWX: "Floats") -> "Floats":
    import numpy as np

    layers = np.arange(len(plan_LWX))[:, None, None]
    load_LW: Floats = (share_LWX * loads_LE[layers, plan_LWX]).sum(axis=2)
    return load_LW


def _read_array(path: Path) -> "npt.NDArray[Any]":
    import numpy as np

    try:
        loads = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        given = f"{path}, which is none"
        raise ConfigError(field="--loads", wanted="a file of numpy.save", given=given) from error
    if not isinstance(loads, np.ndarray):
        raise ConfigError(field="--loads", wanted="a file of numpy.save", given=f"{path}: several arrays")
    return loads


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        given = f"{path}: {error}"
        raise ConfigError(field="--previous", wanted="a JSON file of moray balance", given=given) from error
    if not isinstance(read, dict) or "phy2log" not in read:
        raise ConfigError(field="--previous", wanted='an object with the key "phy2log"', given=str(path))
    return read


def _show(report: Report) -> None:
    console = Console()
    table = Table(title="mean / max load of the workers", title_justify="left")
    for column in ("", "all layers", "worst layer"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "plan in force": report["balance_before"],
        "this plan": report["balance"],
        "with uneven shares": report["balance_with_shares"],
    }
    for label, found in rows.items():
        figures = ["-", "-"] if found is None else [f"{found['mean']:.4f}", f"{found['worst_layer']:.4f}"]
        table.add_row(label, *figures)
    console.print(table)
    if report["moved_copies"] is not None:
        console.print(
            f"{report['moved_copies']:,} of {report['layers'] * report['slots']:,} copies move"
            f" ({report['moved_share']:.1%})"
        )
    console.print(
        f"{report['layers']} layers, {report['experts']} experts in {report['slots']} slots of"
        f" {report['workers']} workers ({report['policy']}), planned in {report['plan_s']:.2f} s"
    )
    console.print(f"wrote {report['out']}")
