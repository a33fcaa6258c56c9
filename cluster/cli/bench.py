"""`moray bench`: measurements of this machine and of a model on it.

torch and Ray are imported inside the commands: the other commands start without them.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli import bench_load
from cluster.cli.checkpoint import progress
from cluster.cli.dtype import DTYPES, DtypeName
from wire.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.dispatch import DispatchReport
    from cluster.bench.throughput import Row, ThroughputReport, Topology

app = typer.Typer(no_args_is_help=True, help="Measure a model on this machine.")
app.command()(bench_load.load)


class BenchTopology(StrEnum):
    """Where the model runs."""

    IN_PROCESS = "in-process"
    CLUSTER = "cluster"
    BOTH = "both"


_TOPOLOGIES: Mapping[BenchTopology, "tuple[Topology, ...]"] = MappingProxyType(
    {
        BenchTopology.IN_PROCESS: ("in-process",),
        BenchTopology.CLUSTER: ("cluster",),
        BenchTopology.BOTH: ("in-process", "cluster"),
    }
)


@app.command()
def throughput(  # noqa: PLR0913, PLR0917 - one parameter a flag
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a model in the box.")] = "nano",
    dtype: Annotated[str, typer.Option(help="Forms of the weights, with commas between.")] = "auto",
    topology: Annotated[
        BenchTopology,
        typer.Option(help="One process, a cluster as deployed, or both in turns: both are in memory."),
    ] = BenchTopology.IN_PROCESS,
    batches: Annotated[str, typer.Option(help="Requests decoded together, with commas between.")] = "1,8,32",
    prefill_tokens: Annotated[int, typer.Option(min=0, help="Prompt of the prefill; 0 = none.")] = 2048,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompts that are decoded from.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded.")] = 64,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step at most.")] = 2048,
    threads: Annotated[int, typer.Option(min=0, help="Of each process; 0 = every CPU.")] = 0,
    experts: Annotated[int, typer.Option(min=1, help="Expert workers of the cluster.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 3,
    profile: Annotated[bool, typer.Option("--profile", help="Show where a step's time goes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Prefill and decode rates, and the share of what the machine allows."""
    dtypes = _dtypes(dtype)
    sizes = _numbers(batches, field="--batches")
    from cluster.bench.throughput import ThroughputSpec, measure_throughput
    from cluster.models import find_model

    spec = ThroughputSpec(
        model=model,
        path=find_model(model).path,
        dtypes=dtypes,
        topologies=_TOPOLOGIES[topology],
        batches=sizes,
        prefill_tokens=prefill_tokens,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        step_tokens=step_tokens,
        num_threads=threads or len(os.sched_getaffinity(0)),
        num_experts=experts,
        repeats=repeats,
        has_profile=profile,
    )
    with (
        progress(f"Measuring {model}", is_shown=not as_json) as on_progress,
        # Ray prints what happens to its workers, and stdout is for the report.
        redirect_stdout(sys.stderr),
    ):
        report = measure_throughput(spec, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _show(report)


@app.command()
def dispatch(
    rounds: Annotated[int, typer.Option(min=100, help="Round trips of each size and way.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Round trips of expert calls without arithmetic, beside what they cannot be quicker than."""
    from cluster.bench.dispatch import measure_dispatch

    with progress("Measuring dispatch", is_shown=not as_json) as on_progress:
        report = measure_dispatch(num_rounds=rounds, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _show_dispatch(report)


def _show_dispatch(report: "DispatchReport") -> None:
    console = Console()
    console.print(f"{report.machine}; one process a CPU; {report.rounds} round trips each", markup=False)
    for case, ways in report.cases.items():
        table = Table("way", "p50 us", "p99 us", "of its baseline", title=case)
        for name, times in ways.items():
            ratio = report.ratio(case, name)
            against = "" if ratio is None else f"{ratio:.2f}"
            table.add_row(name, f"{times.p50_us:.0f}", f"{times.p99_us:.0f}", against)
        console.print(table)


def _dtypes(text: str) -> tuple[DtypeName, ...]:
    names = tuple(name for name in DTYPES for part in text.split(",") if name == part.strip())
    if len(names) != len(text.split(",")):
        raise ConfigError(field="--dtype", wanted=f"some of {', '.join(DTYPES)}", given=text)
    return names


def _numbers(text: str, *, field: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(field=field, wanted="whole numbers of at least 1, with commas between", given=text)
    return tuple(map(int, parts))


def _show(report: "ThroughputReport") -> None:
    console = Console()
    same = [values[0] for values in _labels(report.rows).values() if len(set(values)) == 1]
    facts = [*same, f"threads {report.spec.num_threads}", f"kernels {report.kernels}"]
    console.print(f"{report.spec.model}: {', '.join(facts)}", markup=False)
    limits = [row.limits for row in report.rows]
    rates = {
        "memory": ([one.memory_bytes_per_s / 1e9 for one in limits], "GB/s"),
        "FP32": ([one.float32_flops_per_s / 1e9 for one in limits], "GFLOP/s"),
        "INT8": ([one.int8_ops_per_s / 1e9 for one in limits], "GOP/s"),
    }
    measured = ", ".join(
        f"{name} {min(values):.0f}-{max(values):.0f} {unit}" for name, (values, unit) in rates.items()
    )
    console.print(f"machine, measured before every row: {measured}")
    console.print(_rate_table(report.rows))
    for row in report.rows:
        if row.of_in_process is not None:
            what = f"{row.topology}, {row.dtype}, {_phase(row)}"
            console.print(f"{what}: {row.of_in_process:.2f} of one process", markup=False)
    for dtype in dict.fromkeys(report.spec.dtypes):
        profiled = [row for row in report.rows if row.dtype == dtype and row.step_ms is not None]
        if profiled:
            console.print(_profile_table(profiled, title=f"{dtype}: ms of a step; of prefill, all steps"))


def _labels(rows: "Sequence[Row]") -> dict[str, list[str]]:
    """What may tell rows apart, beside their phase."""
    return {"topology": [row.topology for row in rows], "dtype": [row.dtype for row in rows]}


def _rate_table(rows: "Sequence[Row]") -> Table:
    """Tokens per second; columns that say the same in every row are left out."""
    columns = {name: values for name, values in _labels(rows).items() if len(set(values)) > 1}
    columns["phase"] = [_phase(row) for row in rows]
    rates = [row.tokens_per_s for row in rows]
    numbers = {"tok/s": [_number(rate.median) for rate in rates]}
    if any(rate.lowest < rate.highest for rate in rates):
        numbers["range"] = [f"{_number(rate.lowest)}-{_number(rate.highest)}" for rate in rates]
    numbers["bound"] = [_number(row.bound_tokens_per_s) for row in rows]
    numbers["share"] = [f"{row.share_of_bound:.1%}" for row in rows]
    table = Table(*columns)
    for name in numbers:
        table.add_column(name, justify="right")
    for cells in zip(*columns.values(), *numbers.values(), strict=True):
        table.add_row(*cells)
    return table


def _profile_table(rows: "Sequence[Row]", *, title: str) -> Table:
    """Where the time goes in one precision."""
    table = Table("phase", title=title)
    for part in rows[0].step_ms or ():
        table.add_column(part, justify="right")
    for row in rows:
        table.add_row(_phase(row), *(_number(ms, digits=2) for ms in (row.step_ms or {}).values()))
    return table


def _phase(row: "Row") -> str:
    return row.phase if row.phase == "prefill" else f"{row.phase} {row.batch}"


def _number(value: float, *, digits: int = 1) -> str:
    """Digits behind the point only where there are few before it."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}f}"
