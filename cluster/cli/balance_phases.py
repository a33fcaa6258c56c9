"""`moray balance --by-phase`: a placement for each phase, and what that brings against a joint one."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import numpy.typing as npt

    from cluster.balance.apart import ApartPlan
    from cluster.balance.types import Fleet, Floats, Ints
    from wire.phases import Phase


def balance_phases(
    loads: "npt.NDArray[Any]", fleet: "Fleet", *, num_nodes: int, previous: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan as it is written, and the report on it.

    Args:
        loads: (2, L, E) load of every expert, prefill first.
        fleet: all workers.
        num_nodes: of the workers.
        previous: the plan in force as it was written; None for none.

    Raises:
        ConfigError: loads, workers, slots or the previous plan do not fit; names the option.
    """
    from cluster.balance.apart import plan_apart
    from cluster.balance.inputs import check_capacity, check_phase_loads, phases_from_list, plan_from_lists
    from cluster.balance.measure import count_moves

    loads_of = check_phase_loads(loads)
    num_layers, num_experts = loads_of["prefill"].shape
    check_capacity(num_experts, num_workers=fleet.num_workers, num_nodes=num_nodes, num_slots=fleet.num_slots)
    previous_LWX: Ints | None = None
    if previous is not None:
        previous_LWX = plan_from_lists(
            previous["phy2log"],
            num_layers=num_layers,
            num_experts=num_experts,
            fleet_shape=(fleet.num_workers, fleet.num_slots),
        )
    phases = phases_from_list((previous or {}).get("phases", []))
    began_s = time.perf_counter()
    plan = plan_apart(loads_of, fleet, previous_LWX=previous_LWX, previous_phases=phases[: fleet.num_workers])
    took_s = time.perf_counter() - began_s
    moved = None if previous_LWX is None else count_moves(previous_LWX, plan.plan_LWX, num_experts)
    report = {
        "policy": "by phase",
        "layers": num_layers,
        "experts": num_experts,
        "workers": fleet.num_workers,
        "slots": fleet.num_workers * fleet.num_slots,
        "phases": _compare(loads_of, plan, fleet),
        "moved_copies": moved,
        "moved_share": None if moved is None else moved / plan.plan_LWX.size,
        "plan_s": took_s,
    }
    return {"phy2log": plan.plan_LWX.reshape(num_layers, -1).tolist(), "phases": plan.phases}, report


def _compare(loads: "Mapping[Phase, Floats]", plan: "ApartPlan", fleet: "Fleet") -> dict[str, Any]:
    """Phase -> how level the workers are that take its rows, apart and with one plan for both phases."""
    from cluster.balance.homes import plan_homes
    from cluster.balance.measure import levelness, worker_loads

    joint_LWX = plan_homes(loads["prefill"] + loads["decode"], fleet)
    return {
        phase: {
            "workers": len(plan.workers_of(phase)),
            "balance": levelness(worker_loads(loads_LE, plan.plan_LWX[:, plan.workers_of(phase)])),
            "balance_in_joint_plan": levelness(worker_loads(loads_LE, joint_LWX)),
        }
        for phase, loads_LE in loads.items()
    }


def show_phases(report: Mapping[str, Any]) -> None:
    """Prints the report for people."""
    console = Console()
    table = Table(title="mean / max load of the workers that take a phase's rows", title_justify="left")
    for column in ("", "workers", "all layers", "worst layer", "one joint plan"):
        table.add_column(column, justify="left" if not column else "right")
    for phase, found in report["phases"].items():
        figures = [found["balance"]["mean"], found["balance"]["worst_layer"]]
        figures.append(found["balance_in_joint_plan"]["mean"])
        table.add_row(phase, str(found["workers"]), *(f"{figure:.4f}" for figure in figures))
    console.print(table)
    if report["moved_copies"] is not None:
        console.print(f"{report['moved_copies']:,} copies move ({report['moved_share']:.1%})")
    console.print(
        f"{report['layers']} layers, {report['experts']} experts in {report['slots']} slots of"
        f" {report['workers']} workers, planned in {report['plan_s']:.2f} s"
    )
    console.print(f"wrote {report['out']}")
