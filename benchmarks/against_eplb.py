"""The balancer against DeepSeek's EPLB: balance, copies moved and time, on eight families of loads.

    .venv/bin/python benchmarks/against_eplb.py [--families zipf08,drift] [--configs 72gpu_288_global]
    [--json]

Both plan the same windows in the same process with one thread, the balancer from its own last plan; times
are CPU seconds, medians over the windows. EPLB is benchmarks/_eplb.py, many times faster than the published
code. With all layers a row also carries what the published code reached on the same loads
(tests/data/reference/eplb).
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks._eplb import plan_eplb
from benchmarks._expert_loads import FAMILIES, NUM_GROUPS, Floats, windows
from cluster.balance.grouped import Nodes, plan_grouped
from cluster.balance.homes import plan_homes
from cluster.balance.measure import balance_of, count_moves, worker_loads
from cluster.balance.shares import plan_shares
from cluster.balance.types import Fleet, Ints

TABLE = Path(__file__).resolve().parent.parent / "tests/data/reference/eplb/table.json"
SEED, NUM_WINDOWS, NUM_LAYERS = 1, 3, 58
REPEATS = 3
"""Times that every window is planned; only the time differs."""
TIMED = "320gpu_320_global"
"""The configuration whose time is held against EPLB's."""
ROUNDING = 1e-9
WIDTH = 150


@dataclass(frozen=True)
class Config:
    """Workers, slots of a layer over all of them, and nodes."""

    name: str
    num_workers: int
    num_slots: int
    num_nodes: int


CONFIGS = {
    config.name: config
    for config in (
        Config("32gpu_288_hier4", 32, 288, 4),
        Config("32gpu_320_hier4", 32, 320, 4),
        Config("64gpu_320_hier8", 64, 320, 8),
        Config("32gpu_288_global", 32, 288, 32),
        Config("72gpu_288_global", 72, 288, 9),
        Config("72gpu_360_global", 72, 360, 9),
        Config("144gpu_288_global", 144, 288, 18),
        Config("320gpu_320_global", 320, 320, 40),
    )
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one planner reached over the windows."""

    balance: float
    """Mean over max load of the workers, shares even; mean over layers and windows."""
    worst_layer: float
    moved_share: float
    """Copies that some worker receives per re-plan, as a part of all."""
    plan_s: float
    """CPU seconds, median."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Both planners on one family and configuration."""

    family: str
    config: str
    ours: Result
    eplb: Result
    published: Result | None
    """EPLB itself, from the table; its seconds are of another machine."""
    balance_with_shares: float
    """Ours, each expert's rows split over its replicas as cluster/balance/shares.py says."""

    @property
    def is_kept(self) -> bool:
        """At least the balance, at most half of the moves; on 320 workers at most twice the time too."""
        bars = [bar for bar in (self.eplb, self.published) if bar is not None]
        is_level = all(self.ours.balance >= bar.balance - ROUNDING for bar in bars)
        moves_few = all(self.ours.moved_share <= bar.moved_share / 2 for bar in bars)
        is_quick = self.config != TIMED or self.ours.plan_s <= 2 * self.eplb.plan_s
        return is_level and moves_few and is_quick


def main(
    families: Annotated[str, typer.Option(help="With commas between.")] = ",".join(FAMILIES),
    configs: Annotated[str, typer.Option(help="With commas between.")] = ",".join(CONFIGS),
    layers: Annotated[int, typer.Option(min=1)] = NUM_LAYERS,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compares both planners."""
    for option, names, known in (("--families", families, FAMILIES), ("--configs", configs, CONFIGS)):
        unknown = [name for name in names.split(",") if name not in known]
        if unknown:
            raise typer.BadParameter(f"{option}: wanted some of {', '.join(known)}; got {unknown[0]}")
    torch.set_num_threads(1)
    rows = [
        compare(family, CONFIGS[name], num_layers=layers)
        for family in families.split(",")
        for name in configs.split(",")
    ]
    if as_json:
        print(json.dumps([{**asdict(row), "is_kept": row.is_kept} for row in rows]))
    else:
        show(rows)


def compare(family: str, config: Config, *, num_layers: int = NUM_LAYERS) -> Row:
    """Both planners on the windows of one family."""
    rows = list(windows(family, seed=SEED, num_windows=NUM_WINDOWS, num_layers=num_layers))
    ours, plans = _measure(rows, lambda rows_LE, previous: _ours(rows_LE, config, previous))
    eplb, _ = _measure(rows, lambda rows_LE, _: _eplb(rows_LE, config))
    shared = [
        balance_of(_shared_loads(rows_LE, plan)).mean() for rows_LE, plan in zip(rows, plans, strict=True)
    ]
    published = _published(family, config) if num_layers == NUM_LAYERS else None
    return Row(
        family=family,
        config=config.name,
        ours=ours,
        eplb=eplb,
        published=published,
        balance_with_shares=float(np.mean(shared)),
    )


def _measure(rows: list[Floats], plan: Callable[[Floats, Ints | None], Ints]) -> tuple[Result, list[Ints]]:
    plans: list[Ints] = []
    seconds, moved = [], []
    for rows_LE in rows:
        previous = plans[-1] if plans else None
        for _ in range(REPEATS):
            began_s = time.process_time()
            planned = plan(rows_LE, previous)
            seconds.append(time.process_time() - began_s)
        plans.append(planned)
        if previous is not None:
            moved.append(count_moves(previous, plans[-1], rows_LE.shape[1]) / plans[-1].size)
    balances = [balance_of(worker_loads(rows_LE, plan)) for rows_LE, plan in zip(rows, plans, strict=True)]
    result = Result(
        balance=float(np.mean(balances)),
        worst_layer=float(np.min(balances)),
        moved_share=statistics.mean(moved),
        plan_s=statistics.median(seconds),
    )
    return result, plans


def _ours(rows_LE: Floats, config: Config, previous: Ints | None) -> Ints:
    num_slots = config.num_slots // config.num_workers
    if NUM_GROUPS % config.num_nodes:
        domain_W = np.arange(config.num_workers) // (config.num_workers // config.num_nodes)
        return plan_homes(rows_LE, Fleet(num_slots=num_slots, domain_W=domain_W), previous_LWX=previous)
    nodes = Nodes(
        num_nodes=config.num_nodes,
        num_workers=config.num_workers,
        num_slots=num_slots,
        num_groups=NUM_GROUPS,
    )
    return plan_grouped(rows_LE, nodes, previous_LWX=previous)


def _eplb(rows_LE: Floats, config: Config) -> Ints:
    plan = plan_eplb(
        torch.from_numpy(rows_LE),
        num_slots=config.num_slots,
        num_groups=NUM_GROUPS,
        num_nodes=config.num_nodes,
        num_workers=config.num_workers,
    )
    return plan.view(len(rows_LE), config.num_workers, -1).numpy()


def _shared_loads(rows_LE: Floats, plan_LWX: Ints) -> Floats:
    layers = np.arange(len(plan_LWX))[:, None, None]
    load_LW: Floats = (plan_shares(rows_LE, plan_LWX) * rows_LE[layers, plan_LWX]).sum(axis=2)
    return load_LW


def _published(family: str, config: Config) -> Result:
    (found,) = [
        row
        for row in json.loads(TABLE.read_text())["rows"]
        if (row["kind"], row["config"]) == (family, config.name)
    ]
    return Result(
        balance=found["balancedness"],
        worst_layer=found["balancedness_worst_layer"],
        moved_share=found["moved_fraction"],
        plan_s=found["cpu_seconds_median"],
    )


def show(rows: list[Row]) -> None:
    """One line a row: ours beside EPLB's."""
    table = Table(title="Moray / EPLB", title_justify="left")
    for column in ("loads", "config", "balance", "worst layer", "with shares", "moved", "CPU s", "kept"):
        table.add_column(column, justify="left" if column in ("loads", "config") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=WIDTH).print(table)


def _cells(row: Row) -> Iterator[str]:
    yield from (row.family, row.config)
    pairs: list[tuple[Any, Any, str]] = [
        (row.ours.balance, row.eplb.balance, ".4f"),
        (row.ours.worst_layer, row.eplb.worst_layer, ".4f"),
    ]
    yield from (f"{ours:{form}} / {theirs:{form}}" for ours, theirs, form in pairs)
    yield f"{row.balance_with_shares:.4f}"
    yield f"{row.ours.moved_share:.1%} / {row.eplb.moved_share:.1%}"
    yield f"{row.ours.plan_s:.3f} / {row.eplb.plan_s:.3f}"
    yield "yes" if row.is_kept else "no"


if __name__ == "__main__":
    typer.run(main)
