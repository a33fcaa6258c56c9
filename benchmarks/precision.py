"""What each precision costs in accuracy: the table of docs/precision.md.

    .venv/bin/python benchmarks/precision.py [--dtypes float32,bfloat16,fp8,int8] [--kv float32] [--json]

Every prompt of the reference checkpoints (tests/data/reference) is scored in one process; the logits are
compared with the goldens, which two other implementations computed in FP32. The checkpoints are small and
random: gaps between their logits are narrow, and one expert or position chosen otherwise changes a token's
logits by whole units. Trained models lose less.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.scoring import score_in_process
from model.precision import PRECISIONS, Precision
from tests.reference_data import SHAPES, checkpoint_dir, goldens
from workers.config import KvConfig

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Accuracy:
    """One checkpoint in one precision, all positions of all its prompts."""

    shape: str
    dtype: str
    """Of the weights; with "+ kv" the form of the cache."""
    top1: float
    """Share of positions with the same best token."""
    mean_kl: float
    """Nats, golden to ours."""
    median_kl: float
    max_logit_error: float
    logit_std: float
    """Of the golden's logits, to compare the error with."""


def main(
    dtypes: Annotated[str, typer.Option(help="With commas between.")] = "float32,bfloat16,fp8,int8",
    kv: Annotated[str, typer.Option(help="Forms of the cache: float32, bfloat16, fp8.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compares every reference checkpoint in every precision with its goldens."""
    names = [name for part in dtypes.split(",") for name in PRECISIONS if name == part.strip()]
    if len(names) != len(dtypes.split(",")):
        raise typer.BadParameter(f"--dtypes: wanted some of {', '.join(PRECISIONS)}; got {dtypes}")
    caches = [KvConfig.model_validate({"dtype": form.strip()}) for form in kv.split(",")]
    rows = [compare(shape, dtype, cache) for shape in SHAPES for dtype in names for cache in caches]
    print(json.dumps([asdict(row) for row in rows])) if as_json else show(rows)


def compare(shape: str, dtype: Precision, cache: KvConfig) -> Accuracy:
    """One row of the table."""
    expected = goldens(shape)
    prompts = [golden.prompt for golden in expected]
    scored = score_in_process(
        str(checkpoint_dir(shape)), prompts, dtype=dtype, chunk_tokens=CHUNK_TOKENS, kv=cache
    )
    wanted = torch.cat([golden.tensor("logits") for golden in expected])
    got = torch.cat([tensors["logits"] for tensors in scored])
    kl = divergence(wanted, got)
    return Accuracy(
        shape=shape,
        dtype=dtype if cache.dtype == "float32" else f"{dtype} + kv {cache.dtype}",
        top1=float((wanted.argmax(-1) == got.argmax(-1)).float().mean()),
        mean_kl=float(kl.mean()),
        median_kl=float(kl.median()),
        max_logit_error=float((wanted - got).abs().max()),
        logit_std=expected[0].logit_std,
    )


def divergence(wanted_TV: Tensor, got_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each position, in nats: (T,)."""
    wanted, got = (logits.double().log_softmax(-1) for logits in (wanted_TV, got_TV))
    return (wanted.exp() * (wanted - got)).sum(-1).clamp(min=0)


def show(rows: list[Accuracy]) -> None:
    """The table in Markdown, as it stands in docs/precision.md."""
    for line in markdown(rows):
        print(line)
    table = Table("dtype", "worst top-1", "worst mean KL", title="over all checkpoints")
    for dtype in dict.fromkeys(row.dtype for row in rows):
        of_dtype = [row for row in rows if row.dtype == dtype]
        worst = min(row.top1 for row in of_dtype), max(row.mean_kl for row in of_dtype)
        table.add_row(dtype, f"{worst[0]:.1%}", f"{worst[1]:.4f}")
    Console(stderr=True).print(table)


def markdown(rows: list[Accuracy]) -> Iterator[str]:
    """Lines of the table."""
    yield "| checkpoint | dtype | top-1 agreement | mean KL | median KL | max logit error | logit std |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.shape} | {row.dtype} | {row.top1:.1%} | {row.mean_kl:.2g} | {row.median_kl:.2g} "
            f"| {row.max_logit_error:.2g} | {row.logit_std:.2g} |"
        )


if __name__ == "__main__":
    typer.run(main)
