"""What long prompts do to streams that decode: prefill and decode apart, against workers of both roles.

    .venv/bin/python benchmarks/prefill_apart.py [--model DIR] [--long-tokens 1500] [--json]

Two clusters of as many workers stand side by side and take turns, one idle while the other is measured.
Streams decode, and after a quiet time long prompts arrive one behind another. Gaps between the tokens
of a stream are noted in both times.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import cluster, machine
from cluster.bench.load.report import Spread, spread_ms
from cluster.client import GenerateOptions, InferenceClient

SEED = 0
PAGE_TOKENS = 16
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 258
STREAM_PROMPT_TOKENS = 16
QUIET_S = 2.0


@dataclass
class Gaps:
    """Seconds between two tokens of a stream."""

    quiet_s: list[float] = field(default_factory=list)
    """While nothing but the streams ran."""
    busy_s: list[float] = field(default_factory=list)
    """While long prompts were read."""
    long_s: list[float] = field(default_factory=list)
    """Not gaps: of each long prompt, to its first token."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of each cluster in a turn."""

    streams: int
    long_prompts: int
    long_tokens: int


def main(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a model in the box.")] = "tiny",
    streams: Annotated[int, typer.Option(min=1, help="Streams that decode.")] = 4,
    long_prompts: Annotated[int, typer.Option(min=1, help="Long prompts of a turn.")] = 6,
    long_tokens: Annotated[int, typer.Option(min=1, help="Of each.")] = 3000,
    turns: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures both arrangements in turns."""
    load = Load(streams=streams, long_prompts=long_prompts, long_tokens=long_tokens)
    with cluster(config(model, "apart", load)) as apart, cluster(config(model, "both", load)) as both:
        addresses = {"apart": apart, "both": both}
        found = {name: Gaps() for name in addresses}
        for turn in range(turns):
            for name, address in addresses.items():
                asyncio.run(one_turn(address, load, seed=turn, gaps=found[name]))
    show(found, load, as_json=as_json)


def config(model: str, roles: str, load: Load) -> dict[str, Any]:
    """Two attention workers and two expert workers either way."""
    num_tokens = load.long_tokens * load.long_prompts + 4096 * load.streams
    group = {"num_pages": num_tokens // PAGE_TOKENS, "max_batch_requests": 64}
    none = {"replicas": 0}
    apart = {"prefill": {**group, "replicas": 1}, "decode": {**group, "replicas": 1}}
    both = {"prefill": none, "decode": none, "both": {**group, "replicas": 2}}
    return {"model": model, "kv": {"page_tokens": PAGE_TOKENS}, **(apart if roles == "apart" else both)}


async def one_turn(address: str, load: Load, *, seed: int, gaps: Gaps) -> None:
    """Streams decode; they end with the last long prompt."""
    rng = random.Random(seed)
    async with InferenceClient(address) as client, asyncio.TaskGroup() as group:
        is_busy, is_over = asyncio.Event(), asyncio.Event()
        begun = [asyncio.Event() for _ in range(load.streams)]
        for event in begun:
            prompt = tokens(rng, STREAM_PROMPT_TOKENS)
            group.create_task(stream(client, prompt, gaps, events=(event, is_busy, is_over)))
        for event in begun:
            await event.wait()
        await asyncio.sleep(QUIET_S)
        is_busy.set()
        for _ in range(load.long_prompts):
            began_s = time.perf_counter()
            await client.tokens(tokens(rng, load.long_tokens), GenerateOptions(max_tokens=1, ignore_eos=True))
            gaps.long_s.append(time.perf_counter() - began_s)
        is_over.set()


async def stream(
    client: InferenceClient,
    prompt: list[int],
    gaps: Gaps,
    *,
    events: tuple[asyncio.Event, asyncio.Event, asyncio.Event],
) -> None:
    """Notes the gaps of one stream after another until it is over."""
    begun, is_busy, is_over = events
    options = GenerateOptions(max_tokens=1000, ignore_eos=True)
    while not is_over.is_set():
        last_s = None
        async for _ in client.stream(prompt, options):
            now_s = time.perf_counter()
            if last_s is not None:
                (gaps.busy_s if is_busy.is_set() else gaps.quiet_s).append(now_s - last_s)
            last_s = now_s
            begun.set()
            if is_over.is_set():
                break


def tokens(rng: random.Random, num: int) -> list[int]:
    """Ids of bytes."""
    return [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num)]


def show(found: dict[str, Gaps], load: Load, *, as_json: bool) -> None:
    """Prints the spreads and what is gained."""
    spreads: dict[str, dict[str, Spread]] = {
        name: {"quiet": spread_ms(g.quiet_s), "busy": spread_ms(g.busy_s), "long": spread_ms(g.long_s)}
        for name, g in found.items()
    }
    ratio = spreads["apart"]["busy"].p99 / spreads["both"]["busy"].p99
    if as_json:
        rows = {name: {when: vars(s) for when, s in times.items()} for name, times in spreads.items()}
        facts = {"machine": machine(), "seed": SEED, "load": vars(load)}
        typer.echo(json.dumps({**facts, "ms": rows, "busy_p99_ratio": ratio}))
        return
    table = Table("ms between tokens", "quiet p50", "quiet p99", "busy p50", "busy p99", "long prompt p50")
    for name, times in spreads.items():
        values = (times["quiet"].p50, times["quiet"].p99, times["busy"].p50, times["busy"].p99)
        table.add_row(name, *(f"{value:.1f}" for value in (*values, times["long"].p50)))
    console = Console()
    console.print(table)
    console.print(f"p99 while long prompts arrive, apart / both: {ratio:.2f}", markup=False)
    console.print(f"{machine()}; {load}", markup=False)


if __name__ == "__main__":
    typer.run(main)
