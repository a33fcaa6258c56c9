"""What drafts bring: decode tokens/s with the MTP layer's drafts over without, in turns in one process.

    .venv/bin/python benchmarks/speculation.py [--model MODEL] [--chances 0,0.6,0.8] [--json]

MODEL is a checkpoint with an MTP layer; by default one of size `deep` is made, the MTP layer of which is a
small share of a step, as V3.2's is. So many of the drafts are made right, and the others wrong, after the MTP
layer has run: its time is paid whatever it would have guessed. Prompts are random, so the experts of
neighbouring tokens have less in common than in real text, and checking drafts costs more. Compare only the
ratios between machines.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._one_process import greedy
from cluster.bench.streams import random_prompts
from cluster.cli.dtype import DtypeName
from cluster.models import find_model
from model.checkpoint import Checkpoint
from model.make import make_checkpoint
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.draft_record import DraftRecord
from workers.attention.drafter import Drafter, Speculation
from workers.attention.engine import Engine
from workers.attention.speculation import DraftPolicy, DraftRules
from workers.attention.types import SequenceState
from workers.config import AttentionConfig, ComputeConfig, MtpConfig

PROMPT_TOKENS = 64
SEED = 7

Texts = dict[tuple[int, ...], list[int]]
"""Prompt -> the text that follows it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One batch size and one chance."""

    batch: int
    chances: tuple[float, ...]
    """Of a draft to be right, if those before it were: of the sequences in turn."""
    drafts: float
    """Of a sequence and step, on average."""
    plain_tokens_per_s: float
    drafting_tokens_per_s: float
    ratio: float
    """Median of those of the rounds."""
    cpu_ratio: float
    """The same for tokens per second of this process's CPU time: what counts where others run, too."""


class Ended(NamedTuple):
    """A step that ended."""

    at_s: float
    cpu_s: float
    """CPU time of the process by then."""
    num_sequences: int
    num_drafts: int
    """Of each."""
    num_tokens: int
    """New ones."""


class Forced:
    """Drafter and policy of the engine, which can be switched off and told what is right."""

    def __init__(self, real: Speculation, *, max_drafts: int) -> None:
        self._drafter: Drafter = real.drafter
        self.max_drafts = max_drafts
        self.policy: DraftPolicy | None = None
        """None = no drafts, and no run of the MTP layer."""
        self.texts: Texts = {}
        self.chances: tuple[float, ...] = (0.0,)
        """Of the prompts in turn."""
        self.steps: list[Ended] = []
        self._rng = random.Random(SEED)

    def keep(self, sequence: SequenceState, hidden_TD: Tensor, *, first_position: int) -> None:
        """Only where something is drafted."""
        if self.policy is not None:
            self._drafter.keep(sequence, hidden_TD, first_position=first_position)

    def catch_up(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """As the MTP drafter does."""
        self._drafter.catch_up(sequences, max_rows=max_rows)

    def forget(self, sequences: Sequence[SequenceState], *, max_rows: int) -> None:
        """As the MTP drafter does."""
        self._drafter.forget(sequences, max_rows=max_rows)

    def draft(self, sequences: Sequence[SequenceState], num_drafts: Sequence[int]) -> list[tuple[int, ...]]:
        """As many as the MTP drafter made, each right by chance."""
        drafts = self._drafter.draft(sequences, num_drafts)
        return [self._replace(s, ids) for s, ids in zip(sequences, drafts, strict=True)]

    def finish(self, sequences: Sequence[SequenceState], next_ids: Sequence[int]) -> None:
        """Nothing: no sequence goes on elsewhere."""

    def plan_drafts(self, num_sequences: int) -> int:
        """The policy's choice."""
        return 0 if self.policy is None else self.policy.plan_drafts(num_sequences)

    def plan_each(self, num_drafts: int, records: Sequence[DraftRecord]) -> list[int]:
        """The policy's choice."""
        return [0] * len(records) if self.policy is None else self.policy.plan_each(num_drafts, records)

    def on_step(
        self, num_sequences: int, num_drafts: int, *, seconds: float, accepted: Sequence[int]
    ) -> None:
        """Notes it, and tells the policy."""
        num_tokens = num_sequences + sum(accepted)
        self.steps.append(
            Ended(time.perf_counter(), time.process_time(), num_sequences, num_drafts, num_tokens)
        )
        if self.policy is not None:
            self.policy.on_step(num_sequences, num_drafts, seconds=seconds, accepted=accepted)

    def _replace(self, sequence: SequenceState, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        text = self.texts[sequence.spec.token_ids]
        truth = text[sequence.num_new_tokens : sequence.num_new_tokens + len(draft_ids)]
        chance = self.chances[list(self.texts).index(sequence.spec.token_ids) % len(self.chances)]
        return tuple(token if self._rng.random() < chance else token ^ 1 for token in truth)


def main(  # noqa: PLR0913, PLR0917 - one parameter a flag
    model: Annotated[str, typer.Option(help="Checkpoint, or a model in the box; empty = made here.")] = "",
    dtype: Annotated[DtypeName, typer.Option()] = "int8",
    chances: Annotated[str, typer.Option(help="With commas between; 0/0.8 = of prompts in turn.")] = "0,0.6",
    batches: Annotated[str, typer.Option(help="With commas between.")] = "1,8",
    max_drafts: Annotated[int, typer.Option(min=1, max=4)] = 3,
    new_tokens: Annotated[int, typer.Option(min=16)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures every batch size with every chance, without and with drafts in turns."""
    if not model:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "deep"
            make_checkpoint(path, size="deep")
            main(str(path), dtype, chances, batches, max_drafts, new_tokens, repeats, threads, as_json)
        return
    vocab_size = Checkpoint.open(find_model(model).path).config.vocab_size
    results = []
    with drafting_engine(model, dtype, max_drafts=max_drafts, threads=threads) as (engine, forced):
        for batch in map(int, batches.split(",")):
            prompts = random_prompts(batch, num_tokens=PROMPT_TOKENS, vocab_size=vocab_size, seed=SEED)
            for asked in chances.split(","):
                forced.chances = tuple(map(float, asked.split("/")))
                results.append(measure(engine, forced, prompts, new_tokens=new_tokens, repeats=repeats))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"
    report = {"machine": machine, "model": model, "dtype": dtype, "max_drafts": max_drafts, "seed": SEED}
    rows = [asdict(result) for result in results]
    print(json.dumps({**report, "results": rows})) if as_json else show(report, results)


@contextmanager
def drafting_engine(
    model: str, dtype: DtypeName, *, max_drafts: int, threads: int
) -> Iterator[tuple[Engine, Forced]]:
    """A whole engine, and what decides its drafts."""
    made: list[Forced] = []

    def change(speculation: Speculation) -> Speculation:
        made.append(Forced(speculation, max_drafts=max_drafts))
        return Speculation(drafter=made[0], policy=made[0])

    config = EngineConfig(
        group=AttentionConfig(num_threads=threads),
        compute=ComputeConfig(dtype=dtype),
        mtp=MtpConfig(max_drafts=max_drafts),
        change_speculation=change,
    )
    checkpoint = Checkpoint.open(find_model(model).path)
    engine = build_whole_engine(checkpoint, config=config, metrics=Metrics("attention"))
    if not made:
        raise typer.BadParameter(f"--model: {model} has no MTP layer")
    engine.start()
    try:
        yield engine, made[0]
    finally:
        engine.stop()


def measure(
    engine: Engine, forced: Forced, prompts: list[list[int]], *, new_tokens: int, repeats: int
) -> Result:
    """Both ways in turns; the first turn warms up and tells the policy what steps cost."""
    policy = DraftPolicy(DraftRules(max_drafts=forced.max_drafts))
    rates: dict[bool, list[float]] = {False: [], True: []}
    cpu_rates: dict[bool, list[float]] = {False: [], True: []}
    drafts: list[float] = []
    for turn in range(repeats + 1):
        for is_drafting in (False, True):
            forced.policy = policy if is_drafting else None
            forced.steps.clear()
            texts = greedy(engine, prompts, max_tokens=new_tokens)
            if is_drafting and texts != [forced.texts[tuple(prompt)] for prompt in prompts]:
                raise SystemExit("drafts changed the text")
            forced.texts = {tuple(prompt): text for prompt, text in zip(prompts, texts, strict=True)}
            if turn > 0:
                steps = [step for step in forced.steps if step.num_sequences == len(prompts)]
                num_tokens = sum(step.num_tokens for step in steps[1:])
                rates[is_drafting].append(num_tokens / (steps[-1].at_s - steps[0].at_s))
                cpu_rates[is_drafting].append(num_tokens / (steps[-1].cpu_s - steps[0].cpu_s))
            if turn > 0 and is_drafting:
                drafts.append(statistics.mean(step.num_drafts for step in forced.steps))
    return Result(
        batch=len(prompts),
        chances=forced.chances,
        drafts=statistics.mean(drafts),
        plain_tokens_per_s=statistics.median(rates[False]),
        drafting_tokens_per_s=statistics.median(rates[True]),
        ratio=_ratio(rates),
        cpu_ratio=_ratio(cpu_rates),
    )


def _ratio(rates: dict[bool, list[float]]) -> float:
    return statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))


def show(report: dict[str, object], results: list[Result]) -> None:
    """The report as a table."""
    table = Table("batch", "right", "drafts", "without, tok/s", "with, tok/s", "ratio", "CPU ratio")
    for result in results:
        table.add_row(
            str(result.batch),
            ", ".join(f"{chance:.0%}" for chance in result.chances),
            f"{result.drafts:.2f}",
            f"{result.plain_tokens_per_s:.1f}",
            f"{result.drafting_tokens_per_s:.1f}",
            f"{result.ratio:.2f}x",
            f"{result.cpu_ratio:.2f}x",
        )
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in report.items()))


if __name__ == "__main__":
    typer.run(main)
