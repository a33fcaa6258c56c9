"""How a decode step grows with the context, once the indexer limits what attention reads.

    .venv/bin/python benchmarks/long_context.py [--model BENCH_1B --short 2048 --long 16256] [--json]

BENCH_1B is a checkpoint of `moray checkpoint make --size bench-1b`; by default the model in the box is
measured, whose indexer selects 64 positions. A request decodes at both lengths; the indexer's part, which
grows with the context by its nature, is shown apart.
"""

import json
import statistics
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.places import Place, in_process
from cluster.bench.streams import decode_profile, random_prompts
from cluster.cli.dtype import DtypeName
from cluster.models import find_model
from model.checkpoint import Checkpoint
from model.profile import StepClock

NEW_TOKENS = 48
SEED = 7


def main(  # noqa: PLR0913, PLR0917 - one parameter a flag
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a model in the box.")] = "nano",
    dtype: Annotated[DtypeName, typer.Option()] = "int8",
    short: Annotated[int, typer.Option(min=1)] = 128,
    long: Annotated[int, typer.Option(min=1)] = 1024,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures both lengths in turns and compares their medians."""
    checkpoint, clock = Checkpoint.open(find_model(model).path), StepClock()
    longest, context = max(short, long) + NEW_TOKENS, checkpoint.config.max_position_embeddings
    if longest > context:
        raise typer.BadParameter(f"{longest} tokens, {NEW_TOKENS} new ones among them; {model} has {context}")
    place = Place(
        dtype=dtype,
        num_threads=threads,
        num_cached_tokens=longest,
        step_tokens=2048,
        num_requests=1,
    )
    steps: dict[int, list[dict[str, float]]] = {short: [], long: []}
    with in_process(checkpoint, place, clock=clock) as ask:
        for repeat in range(repeats):
            for num_tokens, found in steps.items():
                prompt = random_prompts(
                    1, num_tokens=num_tokens, vocab_size=checkpoint.config.vocab_size, seed=SEED + repeat
                )
                found.append(decode_profile(ask, prompt, clock, num_tokens=NEW_TOKENS))
                step_ms = sum(found[-1].values())
                print(f"round {repeat} {num_tokens} tokens: {step_ms:.2f} ms a step", file=sys.stderr)
    medians = {
        num_tokens: {part: statistics.median(step[part] for step in found) for part in found[0]}
        for num_tokens, found in steps.items()
    }
    without = {n: sum(ms for part, ms in parts.items() if part != "indexer") for n, parts in medians.items()}
    ratio = without[long] / without[short]
    if as_json:
        print(json.dumps({"ms": medians, "ms_without_indexer": without, "ratio": ratio}))
        return
    table = Table("context", *medians[short], "without indexer", title="ms of a decode step")
    for num_tokens, parts in medians.items():
        table.add_row(str(num_tokens), *(f"{ms:.2f}" for ms in parts.values()), f"{without[num_tokens]:.2f}")
    Console().print(table)
    print(f"without the indexer: {ratio:.2f} times the time at {long / short:.1f} times the context")


if __name__ == "__main__":
    typer.run(main)
