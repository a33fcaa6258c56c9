"""Five times what a cluster can serve: accepted requests keep their latency, others are refused at once.

    .venv/bin/python benchmarks/overload.py [--model DIR] [--times 5] [--json]

First a full house: as many clients as the router lets in, each asking again when it has its answer. What they
get is the capacity. Then requests arrive at random at a multiple of it. Both take turns against one cluster.
"""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import cluster, machine
from cluster.bench.load.arrivals import SyntheticLoad
from cluster.bench.load.measure import LoadSpec, measure_load
from cluster.bench.load.report import make_report
from cluster.bench.load.types import Objectives, Outcome

SEED = 0
PROMPT_TOKENS = 32
NEW_TOKENS = 96
CONNECTIONS = 8


def main(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a model in the box.")] = "tiny",
    room: Annotated[int, typer.Option(min=1, help="Requests that the router lets in.")] = 16,
    times: Annotated[float, typer.Option(min=1, help="Of the capacity, what arrives.")] = 5.0,
    requests: Annotated[int, typer.Option(min=1, help="Of a turn's full house.")] = 100,
    turns: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures a full house and an overload in turns."""
    full: list[Outcome] = []
    over: list[Outcome] = []
    rates: list[float] = []
    with cluster({"model": model, "router": {"max_active_requests": room}}) as address:
        ask(address, load(requests, rate_per_s=1.0), seed=0, clients=room)
        for turn in range(1, turns + 1):
            house, capacity_per_s = ask(address, load(requests, rate_per_s=1.0), seed=turn, clients=room)
            full += house
            rates.append(capacity_per_s)
            arriving = load(round(requests * times), rate_per_s=times * capacity_per_s)
            over += ask(address, arriving, seed=turn, clients=0)[0]
    show(full, over, rates, times=times, as_json=as_json)


def load(num_requests: int, *, rate_per_s: float) -> SyntheticLoad:
    """Requests of one size."""
    return SyntheticLoad(
        arrivals="poisson",
        num_requests=num_requests,
        rate_per_s=rate_per_s,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )


def ask(address: str, source: SyntheticLoad, *, seed: int, clients: int) -> tuple[tuple[Outcome, ...], float]:
    """What became of the requests, and whole answers a second."""
    spec = LoadSpec(source=source, seed=seed, clients=clients, connections=CONNECTIONS)
    result = measure_load(address, spec, on_progress=lambda _done, _total: None)
    return result.outcomes, result.report.requests_per_s


def show(
    full: list[Outcome], over: list[Outcome], rates: list[float], *, times: float, as_json: bool
) -> None:
    """Prints latencies of both and how they compare."""
    reports = {
        "full house": make_report(full, objectives=Objectives()),
        "overload": make_report(over, objectives=Objectives()),
    }
    house, overload = reports.values()
    ratios = {
        f"{name}_{share}": getattr(getattr(overload, name), share) / getattr(getattr(house, name), share)
        for name in ("ttft_ms", "itl_ms", "answer_ms")
        for share in ("p50", "p99")
    }
    if as_json:
        facts: dict[str, Any] = {"machine": machine(), "seed": SEED, "times": times, "capacity_per_s": rates}
        rows = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps({**facts, "results": rows, "overload_over_full": ratios}))
        return
    table = Table("", "answers", "refused", "failed", "first token p50/p99", "gap p50/p99", "refusal p99, ms")
    for name, report in reports.items():
        counts = (report.num_done, report.num_refused, report.num_failed)
        first, gap = (f"{s.p50:.1f} / {s.p99:.1f}" for s in (report.ttft_ms, report.itl_ms))
        table.add_row(name, *map(str, counts), first, gap, f"{report.refusal_ms.p99:.1f}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()), markup=False)
    capacity = ", ".join(f"{rate:.1f}" for rate in rates)
    console.print(f"{machine()}; capacity {capacity} answers/s, {times:g} times that arrived", markup=False)


if __name__ == "__main__":
    typer.run(main)
