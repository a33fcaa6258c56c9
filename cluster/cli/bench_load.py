"""`moray bench load`: what users would see of a cluster under a load like theirs.

The measurement is imported inside the command: the other commands start without it.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.load.arrivals import SyntheticLoad
from cluster.bench.load.types import Arrivals
from cluster.cli.checkpoint import progress
from cluster.config import load_config

if TYPE_CHECKING:
    from cluster.bench.load.measure import LoadResult, LoadSpec
    from cluster.bench.load.report import LoadReport, Spread

_RATE = 4.0
_PROMPT_TOKENS = 256
_NEW_TOKENS = 64


Address = Annotated[
    str | None, typer.Option(help="host:port of a running router; without it a cluster is started.")
]
Config = Annotated[Path | None, typer.Option(help="YAML config file of the cluster to start.")]
Model = Annotated[str | None, typer.Option(help="Model of the cluster to start.")]
Requests = Annotated[int, typer.Option(min=0, help="How many; 0 = 100, or all of the trace.")]
Gaps = Annotated[Arrivals, typer.Option(help="Gaps between requests.")]
Rate = Annotated[float, typer.Option(min=1e-3, help="Requests a second.")]
Burstiness = Annotated[
    float, typer.Option(min=1e-3, help="Of gamma arrivals: 1 = poisson, less = in bursts.")
]
Clients = Annotated[
    int, typer.Option(min=0, help="A closed loop of so many clients instead of arrivals; 0 = none.")
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Of a prompt, on average.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Of an answer, on average.")]
Share = Annotated[float, typer.Option(min=0, max=1, help="Lengths vary by this share, up and down.")]
SharedTokens = Annotated[int, typer.Option(min=0, help="Beginning that all prompts share.")]
Trace = Annotated[Path | None, typer.Option(help="Requests of a trace in Mooncake's format (docs/load.md).")]
Speed = Annotated[float, typer.Option(min=1e-3, help="Of the trace; 2 = twice as fast.")]
TokenScale = Annotated[
    float, typer.Option(min=1e-6, max=1, help="Of the trace's lengths, for short contexts.")
]
Connections = Annotated[int, typer.Option(min=1, max=1024, help="Between here and the router.")]
DeadlineS = Annotated[float | None, typer.Option(min=0, help="Of each request.")]
TtftMs = Annotated[float, typer.Option(min=0, help="Good answers begin within; 0 = any.")]
ItlMs = Annotated[float, typer.Option(min=0, help="Good answers' mean gap between tokens; 0 = any.")]
Seed = Annotated[int, typer.Option(help="Of lengths, tokens and arrivals.")]
Plot = Annotated[Path | None, typer.Option(help="PNG of latencies, queue and rate.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def load(  # noqa: PLR0913, PLR0917 - one parameter a flag
    address: Address = None,
    config: Config = None,
    model: Model = None,
    requests: Requests = 0,
    arrivals: Gaps = "poisson",
    rate: Rate = _RATE,
    burstiness: Burstiness = 1.0,
    clients: Clients = 0,
    prompt_tokens: PromptTokens = _PROMPT_TOKENS,
    new_tokens: NewTokens = _NEW_TOKENS,
    spread: Share = 0.0,
    shared_tokens: SharedTokens = 0,
    trace: Trace = None,
    speed: Speed = 1.0,
    token_scale: TokenScale = 1.0,
    connections: Connections = 8,
    deadline_s: DeadlineS = None,
    slo_ttft_ms: TtftMs = 0.0,
    slo_itl_ms: ItlMs = 0.0,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Sends a load and reports latencies, throughput, goodput, refusals, queue and cache hits."""
    from cluster.bench.load.measure import LoadSpec, TracedLoad, measure_load
    from cluster.bench.load.plot import check_can_plot, plot_load
    from cluster.bench.load.trace import TraceRules
    from cluster.bench.load.types import Objectives

    if plot is not None:
        check_can_plot(plot)
    source: SyntheticLoad | TracedLoad = SyntheticLoad(
        arrivals=arrivals,
        num_requests=requests or 100,
        rate_per_s=rate,
        burstiness=burstiness,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        spread=spread,
        shared_tokens=shared_tokens,
    )
    if trace is not None:
        rules = TraceRules(speed=speed, token_scale=token_scale, num_requests=requests, seed=seed)
        source = TracedLoad(file=str(trace), rules=rules)
    spec = LoadSpec(
        source=source,
        seed=seed,
        connections=connections,
        clients=clients,
        deadline_s=deadline_s,
        objectives=Objectives(ttft_ms=slo_ttft_ms, itl_ms=slo_itl_ms),
    )
    with progress("Requests", is_shown=not as_json) as on_progress, _router(address, config, model) as target:
        result = measure_load(target, spec, on_progress=on_progress)
    if plot is not None:
        plot_load(result.outcomes, result.report, plot, title=_title(result))
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _show(result)


@contextmanager
def _router(address: str | None, config: Path | None, model: str | None) -> Iterator[str]:
    """The given address, or that of a cluster which ends with the block."""
    if address is not None:
        yield address
        return
    settings = load_config(config, overrides={"model": model, "name": "moray-bench"})
    settings.check_serves()
    # Imported here: Ray and torch take seconds to load.
    from cluster.bench.places import running_cluster

    # Ray prints what happens to its workers, and stdout is for the report.
    with redirect_stdout(sys.stderr), running_cluster(settings) as started:
        yield started


def _title(result: "LoadResult") -> str:
    return f"{result.model}: {_what(result.spec)}"


def _what(spec: "LoadSpec") -> str:
    """The load in a few words."""
    source = spec.source
    closed = f"{spec.clients} clients in a closed loop"
    if not isinstance(source, SyntheticLoad):
        rules = source.rules
        how = closed if spec.clients else f"speed {rules.speed:g}"
        return f"{Path(source.file).name}, {how}, token scale {rules.token_scale:g}"
    how = closed if spec.clients else f"{source.arrivals} {source.rate_per_s:g}/s"
    return f"{how}, about {source.prompt_tokens} + {source.new_tokens} tokens"


def _show(result: "LoadResult") -> None:
    console, report = Console(), result.report
    console.print(_title(result), markup=False)
    console.print(_latencies(report))
    for label, text in _facts(report):
        console.print(f"{label:<14}{text}", markup=False, highlight=False)
    for error, count in report.errors.items():
        console.print(f"{count} x {error}", markup=False, highlight=False)


def _latencies(report: "LoadReport") -> Table:
    rows: list[tuple[str, Spread]] = [
        ("first token", report.ttft_ms),
        ("between tokens", report.itl_ms),
        ("whole answer", report.answer_ms),
    ]
    if report.num_refused:
        rows += [("refusal", report.refusal_ms), ("try again after", report.retry_after_ms)]
    table = Table("ms")
    for name in ("mean", "p50", "p90", "p99", "highest"):
        table.add_column(name, justify="right")
    for label, spread in rows:
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.highest)
        table.add_row(label, *(f"{value:.1f}" for value in values))
    return table


def _facts(report: "LoadReport") -> Iterator[tuple[str, str]]:
    whole = f"{report.num_done} of {report.num_requests} whole"
    yield "answers", f"{whole}, {report.num_refused} refused, {report.num_failed} failed"
    rates = f"{report.requests_per_s:.2f} answers/s, {report.new_tokens_per_s:.0f} new tok/s"
    yield "throughput", f"{rates}, {report.prompt_tokens_per_s:.0f} prompt tok/s in {report.duration_s:.1f} s"
    limits = report.objectives
    if limits.ttft_ms or limits.itl_ms:
        within = f"first token {limits.ttft_ms:g} ms, mean gap {limits.itl_ms:g} ms; 0 = any"
        yield "goodput", f"{report.good_requests_per_s:.2f} answers/s, {report.good_share:.1%} ({within})"
    waiting, running = report.waiting, report.running
    depths = f"{waiting.mean:.1f} wait (most {waiting.highest}), {running.mean:.1f} answering"
    yield "queue", f"{depths} (most {running.highest})"
    yield "cache hits", f"{report.cached_share:.1%} of {report.num_prompt_tokens} prompt tokens"
    if report.late_ms.p99 > 10:
        yield "note", f"requests were sent late: p99 {report.late_ms.p99:.0f} ms; this process is the limit"
