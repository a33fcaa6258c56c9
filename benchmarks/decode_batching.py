"""What batching gains and what process borders cost: decode tokens/s, in one process and in a cluster.

    .venv/bin/python benchmarks/decode_batching.py [--new-tokens 64] [--repeats 3] [--json]

Both run the tiny model in the box with the same prompts in the same run, and must give the same tokens.
Only the ratios are worth comparing between machines.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import cluster, machine
from benchmarks._one_process import greedy, one_process
from cluster.client import GenerateOptions, InferenceClient
from cluster.models import find_model

MODEL = "tiny"
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 64
SEED = 0

Prompts = list[list[int]]
Run = Callable[[Prompts], list[list[int]]]


@dataclass(frozen=True)
class Result:
    """One measurement: the median of the repeats."""

    place: str
    batch: int
    tokens_per_s: float


def main(
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures both places at every batch size."""
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    prompts = [[rng.randrange(3, 259) for _ in range(PROMPT_TOKENS)] for _ in range(max(BATCHES))]
    results = []
    with one_process(find_model(MODEL).path) as local, cluster({"model": MODEL}) as address:
        runs: dict[str, Run] = {
            "one process": lambda asked: greedy(local, asked, max_tokens=new_tokens),
            "cluster": lambda asked: in_cluster(address, asked, new_tokens),
        }
        for batch in BATCHES:
            outputs = {}
            for place, run in runs.items():
                outputs[place], tokens_per_s = measure(run, prompts[:batch], repeats)
                results.append(Result(place, batch, tokens_per_s))
            if outputs["one process"] != outputs["cluster"]:
                raise SystemExit(f"batch {batch}: the cluster gave other tokens than one process")
    show(results, as_json=as_json)


def measure(run: Run, prompts: Prompts, repeats: int) -> tuple[list[list[int]], float]:
    """The tokens, and new tokens per second (prefill included), the median of `repeats` after one warm-up."""
    outputs = run(prompts)
    rates = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        outputs = run(prompts)
        rates.append(sum(map(len, outputs)) / (time.perf_counter() - began_s))
    return outputs, statistics.median(rates)


def in_cluster(address: str, prompts: Prompts, new_tokens: int) -> list[list[int]]:
    """Every prompt at once through the router."""

    async def ask() -> list[list[int]]:
        async with InferenceClient(address) as client:
            options = GenerateOptions(max_tokens=new_tokens, ignore_eos=True)
            return await client.all_tokens(prompts, options)

    return asyncio.run(ask())


def show(results: list[Result], *, as_json: bool) -> None:
    """Prints the figures with the machine that they belong to."""
    rate = {(result.place, result.batch): result.tokens_per_s for result in results}
    if as_json:
        rows = [{"place": r.place, "batch": r.batch, "tokens_per_s": r.tokens_per_s} for r in results]
        typer.echo(json.dumps({"machine": machine(), "seed": SEED, "results": rows}))
        return
    table = Table(
        "batch", "one process, tok/s", "over batch 1", "cluster, tok/s", "over batch 1", "cluster / process"
    )
    for batch in BATCHES:
        alone, apart = rate["one process", batch], rate["cluster", batch]
        table.add_row(
            str(batch),
            f"{alone:.0f}",
            f"{alone / rate['one process', 1]:.2f}x",
            f"{apart:.0f}",
            f"{apart / rate['cluster', 1]:.2f}x",
            f"{apart / alone:.2f}x",
        )
    console = Console()
    console.print(table)
    console.print(f"{machine()}; model tiny, {PROMPT_TOKENS}-token prompts, seed {SEED}")


if __name__ == "__main__":
    typer.run(main)
