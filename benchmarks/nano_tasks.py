"""What moray-nano can do: its scores on prompts that its trainer never saw.

    .venv/bin/python benchmarks/nano_tasks.py [--num 100] [--float32 DIR] [--show-wrong] [--json]

The engine that serves it answers, whole in this process; prompts come from the generator's held-out side with
a seed of their own. Every precision answers the same prompts in the same run; --float32 adds the weights as
they were before the checkpoint was rounded to FP8.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks._one_process import greedy, one_process
from cluster.models import find_model
from model.config import ModelConfig
from model.precision import Precision
from model.reference import Reference
from model.tensor_names import expected_tensors
from training.batches import BatchMaker
from training.config import Stage, TrainingConfig
from training.data.types import Kind
from training.evaluation import SCORED, Score, held_out, score
from training.measures import Measures, accepted_drafts, measure
from workers.checkpoint import open_checkpoint

SEED = 2026
MAX_TOKENS = 200
EOS_ID = 1
PRECISIONS: tuple[Precision, ...] = ("fp8", "int8")
"""Compared with float32."""
MEASURED_ON = Stage(name="sparse", num_steps=0, num_rows=8, row_tokens=320)


def main(
    num: Annotated[int, typer.Option(min=1, help="Conversations of each kind.")] = 100,
    model: Annotated[str, typer.Option(help="Checkpoint, or a model in the box.")] = "nano",
    float32: Annotated[Path | None, typer.Option(help="The same weights unrounded, to compare with.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="Print what went wrong.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Scores a model, and the same model in other precisions."""
    path = find_model(model).path
    loaded = load(path)
    scores = score_all(path, num, threads=threads, dtype="float32")
    report: dict[str, Any] = {"model": path.name, "prompts_of_each_kind": num, "seed": SEED}
    report["scores"] = {"float32": shares(scores)}
    report["json_values_right_too"] = exact_values(scores["json"])
    for dtype in PRECISIONS:
        report["scores"][dtype] = shares(score_all(path, num, threads=threads, dtype=dtype))
    if float32 is not None:
        unrounded = score_all(float32, num, threads=threads, dtype="float32")
        report["scores"]["before rounding"] = shares(unrounded)
    accepted, drafted = drafts(loaded, [s for kind in SCORED for s in scores[kind]])
    report["mtp"] = {"accepted": accepted, "drafted": drafted, "share": accepted / drafted}
    report["measures"] = vars(measures(loaded))
    if show_wrong:
        for one in (s for kind in SCORED for s in scores[kind] if not s.is_right):
            print(f"{one.conversation.kind}: {one.turns[0][0][-80:]!r}: {one.wrong}")
    print(json.dumps(report, indent=1)) if as_json else show(report)


def score_all(path: Path, num: int, *, threads: int, dtype: Precision) -> dict[Kind, list[Score]]:
    """Kind -> scores of the same held-out conversations whatever the model."""
    with answering(path, threads=threads, dtype=dtype) as answer:
        return {kind: score(held_out(kind, num, seed=SEED), answer) for kind in SCORED}


def shares(scores: dict[Kind, list[Score]]) -> dict[str, float]:
    """Kind -> share that is right."""
    return {kind: sum(s.is_right for s in of_kind) / len(of_kind) for kind, of_kind in scores.items()}


def exact_values(scores: Sequence[Score]) -> float:
    """Share of the JSON answers that hold the very values asked for."""
    right = 0
    for one in scores:
        try:
            right += json.loads(one.turns[-1][1]) == one.conversation.check.value
        except ValueError:
            continue
    return right / len(scores)


@contextmanager
def answering(
    path: Path, *, threads: int, dtype: Precision
) -> Iterator[Callable[[Sequence[str]], list[str]]]:
    """Greedy replies of the engine, whole in this process."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def answer(prompts: Sequence[str]) -> list[str]:
        asked = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        replies = greedy(engine, asked, max_tokens=MAX_TOKENS, stop=frozenset({EOS_ID}))
        return [tokenizer.decode(reply) for reply in replies]

    with one_process(path, num_pages=4096, num_threads=threads, dtype=dtype) as engine:
        yield answer


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, read once for everything but the engine."""

    hf: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Tensor]
    """By HF name, float32."""
    tokenizer: Tokenizer


def load(path: Path) -> Loaded:
    """Every tensor of a checkpoint."""
    checkpoint = open_checkpoint(path)
    shapes = expected_tensors(checkpoint.config)
    return Loaded(
        hf=json.loads((path / "config.json").read_text()),
        config=checkpoint.config,
        tensors={name: checkpoint.read(name, shape=shape).float() for name, shape in shapes.items()},
        tokenizer=Tokenizer.from_file(str(path / "tokenizer.json")),
    )


def drafts(loaded: Loaded, scores: Sequence[Score]) -> tuple[int, int]:
    """First MTP drafts accepted and made, over everything that the model wrote for the scores."""
    documents = []
    for one in scores:
        for prompt, text in one.turns:
            prompt_ids, new_ids = (
                loaded.tokenizer.encode(part, add_special_tokens=False).ids for part in (prompt, text)
            )
            documents.append(([*prompt_ids, *new_ids, EOS_ID], len(prompt_ids)))
    return accepted_drafts(Reference(loaded.config, loaded.tensors), documents)


def measures(loaded: Loaded) -> Measures:
    """Sparse against dense attention, and expert balance."""
    prompt_share = TrainingConfig(stages=()).prompt_loss_share
    batches = BatchMaker(loaded.tokenizer, seed=SEED, prompt_share=prompt_share)
    return measure(loaded.config, loaded.tensors, batches, stage=MEASURED_ON, num_batches=8)


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console()
    table = Table("precision", *SCORED, title=f"{report['model']}: share right on held-out prompts")
    for precision, of_kind in report["scores"].items():
        table.add_row(precision, *(f"{of_kind[kind]:.1%}" for kind in SCORED))
    console.print(table)
    measured = report["measures"]
    worse = measured["loss_sparse"] / measured["loss_dense"] - 1
    console.print(f"JSON with the right values too: {report['json_values_right_too']:.1%}")
    console.print(f"MTP first drafts accepted: {report['mtp']['share']:.1%} of {report['mtp']['drafted']}")
    console.print(
        f"loss: sparse {measured['loss_sparse']:.4f}, dense {measured['loss_dense']:.4f}: {worse:+.2%}\n"
        f"expert balance (mean/max): {measured['balance']:.2f}, "
        f"without the learned bias {measured['balance_without_bias']:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
