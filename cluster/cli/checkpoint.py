"""`moray checkpoint`: makes random checkpoints, quantizes any, and says what is in one.

torch is imported inside the commands: the other commands start without it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from model.summary import CheckpointSummary

app = typer.Typer(
    no_args_is_help=True, help="Make random checkpoints; quantize or inspect any in the HF layout."
)

SizeName = Literal["tiny", "nano", "small", "deep", "bench-1b"]
DtypeName = Literal["float32", "bfloat16", "fp8"]
"""The names of model/sizes.py, said again: importing them would load the model package."""
QuantisedName = Literal["fp8", "int8"]
"""The names of model/quantize.py, said again."""

WORKER_COUNTS = (1, 2, 4, 8, 16)
"""Numbers of expert workers that the estimate is given for."""

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]


@app.command()
def make(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    size: Annotated[SizeName, typer.Option(help="Architecture.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[DtypeName, typer.Option(help="Type of the stored matrices.")] = "bfloat16",
    shards: Annotated[int, typer.Option(min=1, max=999, help="Files to spread the weights over.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint of random weights with a byte tokenizer."""
    from model.checkpoint import Checkpoint
    from model.make import make_checkpoint
    from model.summary import summarise

    with progress(f"Writing {out}", is_shown=not as_json) as on_progress:
        make_checkpoint(out, size=size, seed=seed, dtype=dtype, num_shards=shards, on_progress=on_progress)
    _show(out, summarise(Checkpoint.open(out)), as_json=as_json)


@app.command()
def quantize(
    src: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint directory to read.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    to: Annotated[
        QuantisedName, typer.Option(help="fp8: DeepSeek's 128 x 128 blocks; int8: routed experts only.")
    ],
    shards: Annotated[
        int | None, typer.Option(min=1, max=999, help="Files to write; else as many as SRC has.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a copy with its matrices in FP8 or its routed experts in INT8; memory holds one file of it."""
    from model.checkpoint import Checkpoint
    from model.quantize import quantize_checkpoint
    from model.summary import summarise

    with progress(f"Writing {out}", is_shown=not as_json) as on_progress:
        quantize_checkpoint(src, out, to=to, num_shards=shards, on_progress=on_progress)
    _show(out, summarise(Checkpoint.open(out)), as_json=as_json)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint directory.")],
    as_json: JsonOption = False,
) -> None:
    """Check every tensor against the config and say what a cluster needs for it; reads no weight."""
    from model.checkpoint import Checkpoint
    from model.summary import summarise

    checkpoint = Checkpoint.open(directory)
    checkpoint.check()
    _show(directory, summarise(checkpoint), as_json=as_json)


@contextmanager
def progress(title: str, *, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar on stderr, where there is a terminal to show it."""
    console = Console(stderr=True)
    with Progress(
        console=console, disable=not (is_shown and console.is_terminal), transient=True
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(directory: Path, summary: "CheckpointSummary", *, as_json: bool) -> None:
    per_worker = {n: _experts_per_worker(summary, n) * summary.expert_bytes for n in WORKER_COUNTS}
    if as_json:
        fields = dataclasses.asdict(summary)
        typer.echo(json.dumps({"path": str(directory), **fields, "expert_worker_bytes": per_worker}))
        return
    console = Console()
    table = Table(show_header=False, box=None, title=str(directory), title_justify="left")
    for label, value in _rows(summary):
        table.add_row(label, value)
    for num_workers, num_bytes in per_worker.items():
        table.add_row(f"experts on each of {num_workers} workers", _bytes_text(num_bytes))
    console.print(table)


def _experts_per_worker(summary: "CheckpointSummary", num_workers: int) -> int:
    """Experts of all layers on the fullest of some workers, one replica each."""
    return -(-(summary.all_experts_bytes // summary.expert_bytes) // num_workers)


def _rows(summary: "CheckpointSummary") -> list[tuple[str, str]]:
    stored = ", ".join(f"{name} {_bytes_text(count)}" for name, count in summary.dtype_bytes.items())
    layers = f"{summary.num_layers} ({summary.num_moe_layers} with experts), {summary.num_mtp_layers} MTP"
    experts = (
        f"{summary.num_experts} per layer, {summary.num_experts_per_token} of them"
        f" and {summary.num_shared_experts} shared per token"
    )
    forms = ", ".join(f"{_bytes_text(count)} in {form}" for form, count in summary.kv_bytes_by_form.items())
    return [
        ("parameters", f"{summary.num_parameters:,} ({summary.num_active_parameters:,} active per token)"),
        ("stored", f"{stored} in {summary.num_files} file(s)"),
        ("layers", layers),
        ("experts", experts),
        ("context", f"{summary.context_tokens:,} tokens"),
        ("fingerprint", summary.fingerprint),
        ("weights of an attention worker", _bytes_text(summary.attention_worker_bytes)),
        ("cache of one token", forms),
        ("one expert in memory", _bytes_text(summary.expert_bytes)),
    ]


def _bytes_text(num_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
