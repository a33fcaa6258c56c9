"""`moray bench`: measurements of this machine and of a model on it.

torch and Ray are imported inside the commands: the other commands start without them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.checkpoint import progress
from cluster.cli.dtype import DTYPES, DtypeName
from wire.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.throughput import ThroughputReport, Topology

app = typer.Typer(no_args_is_help=True, help="Measure a model on this machine.")


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
        BenchTopology, typer.Option(help="One process, or a cluster as deployed.")
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
    with progress(f"Measuring {model}", is_shown=not as_json) as on_progress:
        report = measure_throughput(spec, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _show(report)


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
    limits = report.limits
    console.print(
        f"kernels {report.kernels}, {report.spec.num_threads} threads; this machine, measured now: memory "
        f"{limits.memory_bytes_per_s / 1e9:.1f} GB/s, FP32 {limits.float32_flops_per_s / 1e9:.0f} GFLOP/s, "
        f"INT8 {limits.int8_ops_per_s / 1e9:.0f} GOP/s"
    )
    table = Table("topology", "dtype", "phase", "batch", "tok/s", "lowest", "highest", "bound", "of bound")
    for row in report.rows:
        rate = row.tokens_per_s
        numbers = [
            f"{value:.1f}" for value in (rate.median, rate.lowest, rate.highest, row.bound_tokens_per_s)
        ]
        table.add_row(
            row.topology, row.dtype, row.phase, str(row.batch), *numbers, f"{row.share_of_bound:.0%}"
        )
    console.print(table)
    profiled = [row for row in report.rows if row.step_ms is not None]
    if profiled:
        console.print(
            _profile_table([(f"{row.dtype} {row.phase} {row.batch}", row.step_ms or {}) for row in profiled])
        )


def _profile_table(rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    parts = list(rows[0][1])
    table = Table("ms of a step", *parts)
    for name, step_ms in rows:
        table.add_row(name, *(f"{step_ms[part]:.2f}" for part in parts))
    return table
