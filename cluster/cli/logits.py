"""`moray logits`: logits and the choices behind them, from one process or from a cluster as deployed."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cluster.cli.checkpoint import progress
from cluster.cli.dtype import DtypeName
from cluster.cli.generate import read_prompts
from wire.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Topology(StrEnum):
    """Where the model runs."""

    IN_PROCESS = "in-process"
    CLUSTER = "cluster"


def logits(  # noqa: PLR0913, PLR0917 - one parameter a flag
    model: Annotated[str, typer.Option(help="Checkpoint directory, or a model in the box.")],
    tokens: Annotated[Path, typer.Option(help='File with {"tokens": [[id, ...], ...]}.')],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    topology: Annotated[Topology, typer.Option(help="In this process or as deployed.")] = Topology.IN_PROCESS,
    experts: Annotated[int, typer.Option(min=1, help="Expert workers of the cluster.")] = 2,
    dtype: Annotated[
        DtypeName, typer.Option(help="Form of the weights; int8 multiplies in INT8.")
    ] = "float32",
    prefill_chunk: Annotated[
        int, typer.Option(min=1, max=2**32 - 1, help="Tokens of one prefill chunk.")
    ] = 512,
) -> None:
    """Writes logits, expert_ids, expert_weights, indexer_ids and mtp_logits of every prompt."""
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        # Said before minutes of work, not after.
        raise ConfigError(field="--out", wanted="a file in a directory that can be written", given=str(out))
    prompts = read_prompts(tokens)
    console = Console(stderr=True)
    with console.status("starting") as status:
        # Imported here: torch and Ray take seconds to load.
        from safetensors.torch import save_file

        from cluster.scoring import score_in_cluster, score_in_process

        if topology is Topology.IN_PROCESS:
            status.stop()
            with progress(f"Loading {model}", is_shown=True) as on_progress:
                scored = score_in_process(
                    model, prompts, dtype=dtype, chunk_tokens=prefill_chunk, on_progress=on_progress
                )
        else:
            scored = score_in_cluster(
                model, prompts, dtype=dtype, chunk_tokens=prefill_chunk, num_experts=experts
            )
        save_file(_named(scored), out)
    console.print(f"wrote {out}")


def _named(scored: "list[dict[str, Tensor]]") -> dict[str, Any]:
    """Names as they are for one prompt, with .0, .1, ... for several."""
    if len(scored) == 1:
        return dict(scored[0])
    return {f"{name}.{i}": tensor for i, tensors in enumerate(scored) for name, tensor in tensors.items()}
