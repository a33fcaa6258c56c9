"""What a cached prefix saves: the first token of a prompt whose beginning is in KV pages, against a cold one.

    .venv/bin/python benchmarks/first_token_cached.py [--model DIR] [--cached 4096] [--own 32] [--json]

Through a whole cluster, with prefill and decode apart and with workers of both roles. In pairs:
a prompt that nobody asked before, then one that begins with the same tokens and ends otherwise.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import cluster, machine
from cluster.client import GenerateOptions, InferenceClient
from model.make import make_checkpoint

SEED = 0
PAGE_TOKENS = 16
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 258
ROLES = ("apart", "both")


def main(
    model: Annotated[str, typer.Option(help="Checkpoint; empty = a random one of size small.")] = "",
    cached: Annotated[int, typer.Option(min=1, help="Tokens that are cached.")] = 4096,
    own: Annotated[int, typer.Option(min=1, help="Tokens behind them.")] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures both arrangements."""
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(Path(folder) / "small")
        if not model:
            make_checkpoint(Path(path), size="small", seed=SEED)
        results = {}
        for roles in ROLES:
            with cluster(config(path, roles, num_tokens=(cached + own) * (repeats + 2))) as address:
                results[roles] = asyncio.run(measure(address, cached, own, repeats))
    show(results, cached=cached, own=own, as_json=as_json)


def config(model: str, roles: str, *, num_tokens: int) -> dict[str, Any]:
    """A cluster whose workers hold so many tokens."""
    group = {"replicas": 1, "num_pages": -(-num_tokens // PAGE_TOKENS)}
    none = {"replicas": 0}
    apart = {"prefill": group, "decode": group, "both": none}
    both = {"prefill": none, "decode": none, "both": group}
    return {
        "model": model,
        "expert": {"replicas": 1},
        "kv": {"page_tokens": PAGE_TOKENS},
        **(apart if roles == "apart" else both),
    }


async def measure(address: str, cached: int, own: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token: cold, and with a cached beginning; a first pair warms up."""
    rng = random.Random(SEED)
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    async with InferenceClient(address) as client:
        for repeat in range(repeats + 1):
            beginning = tokens(rng, cached)
            for name in seconds:
                second_s, num_cached = await first_token(client, beginning + tokens(rng, own))
                wanted = cached // PAGE_TOKENS * PAGE_TOKENS if name == "cached" else 0
                if num_cached != wanted:
                    raise SystemExit(f"{name}: wanted {wanted} cached tokens, got {num_cached}")
                if repeat:
                    seconds[name].append(second_s)
    return seconds


def tokens(rng: random.Random, num: int) -> list[int]:
    """Ids of bytes."""
    return [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num)]


async def first_token(client: InferenceClient, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were cached."""
    began_s, first_s, num_cached = time.perf_counter(), 0.0, 0
    async for message in client.stream(prompt, GenerateOptions(max_tokens=1, ignore_eos=True)):
        if message.token_ids:
            first_s = time.perf_counter() - began_s
        num_cached = max(num_cached, message.usage.cached_tokens)
    return first_s, num_cached


def show(results: dict[str, dict[str, list[float]]], *, cached: int, own: int, as_json: bool) -> None:
    """Prints medians and their ratio."""
    rows: list[dict[str, Any]] = [
        {
            "roles": roles,
            **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
            "ratio": statistics.median(seconds["cached"]) / statistics.median(seconds["cold"]),
            "seconds": seconds,
        }
        for roles, seconds in results.items()
    ]
    if as_json:
        facts = {"machine": machine(), "seed": SEED, "cached_tokens": cached, "own_tokens": own}
        typer.echo(json.dumps({**facts, "results": rows}))
        return
    table = Table("roles", "cold, ms", f"{cached} tokens cached, ms", "cached / cold")
    for row in rows:
        table.add_row(row["roles"], f"{row['cold_ms']:.0f}", f"{row['cached_ms']:.0f}", f"{row['ratio']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"{machine()}; {cached} + {own} tokens, seed {SEED}; medians")


if __name__ == "__main__":
    typer.run(main)
