"""First token behind a hand-over: rows sent layer by layer while later layers compute, or after the last one.

    .venv/bin/python benchmarks/handover_by_layer.py [--model MODEL] [--tokens 1024] [--gbits 10,1] [--json]

This process stands where a decode worker does, pulls prompts from the prefill worker of a cluster on this
host, and checks every frame. A step takes a whole prompt. Three pulls: rows and first token as they come; the
first token of a prompt of which no row is wanted; and the first prompt again, whose rows are all there. A
hand-over after the last layer takes the second and the third. On a slower link than the loopback, a frame
leaves when it was made and the link is free: that is computed from when frames came.
"""

import asyncio
import json
import math
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grpc.aio
import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import cluster, machine
from cluster.client import InferenceClient
from model.make import make_checkpoint
from wire.handshake import Handshake
from wire.proto import attention_pb2, control_pb2
from wire.rpc import CHANNEL_OPTIONS, PREFILL_METHOD
from workers.attention.kv_transfer import Fence, decode_transfer
from workers.attention.types import CacheRows, NewToken

SEED = 3
PAGE_TOKENS = 16
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 258


class Came(NamedTuple):
    """A frame of rows."""

    at_s: float
    """Since the prompt was asked for."""
    num_bytes: int
    first_token_idx: int


@dataclass(frozen=True, kw_only=True)
class Pull:
    """One prompt pulled from a prefill worker."""

    frames: tuple[Came, ...]
    token_s: float
    """When the first token came, since the prompt was asked for."""

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return sum(frame.num_bytes for frame in self.frames)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians of one link, milliseconds to the first token."""

    link: str
    layer_by_layer_ms: float
    after_the_last_ms: float


def main(
    model: Annotated[str, typer.Option(help="Checkpoint, or a model in the box; empty = made here.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 1024,
    prompts: Annotated[int, typer.Option(min=1)] = 5,
    gbits: Annotated[str, typer.Option(help="Gbit/s of links to compute, with commas between.")] = "10,1",
    threads: Annotated[int, typer.Option(min=1, help="Of the prefill worker.")] = 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Pulls prompts, each in the three ways."""
    if not model:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "deep"
            make_checkpoint(path, size="deep")
            main(str(path), tokens, prompts, gbits, threads, as_json)
        return
    with cluster(config(model, tokens, threads=threads)) as address:
        pulled = asyncio.run(pull_all(address, num_prompts=prompts, num_tokens=tokens))
    results = [compare(pulled, gbit=gbit) for gbit in (math.inf, *map(float, gbits.split(",")))]
    facts = {"machine": machine(), "model": model, "tokens": tokens, "bytes": pulled[0][0].num_bytes}
    print(json.dumps({**facts, "results": [asdict(r) for r in results]})) if as_json else show(facts, results)


def config(model: str, num_tokens: int, *, threads: int) -> dict[str, Any]:
    """One prefill worker that takes a prompt in one step, and the decode worker that a cluster needs."""
    group = {"num_pages": 8 * (num_tokens // PAGE_TOKENS + 1), "max_step_tokens": num_tokens}
    prefill = {**group, "replicas": 1, "num_threads": threads}
    return {
        "model": model,
        "kv": {"page_tokens": PAGE_TOKENS},
        "prefill": prefill,
        "decode": {**group, "replicas": 1},
    }


async def pull_all(address: str, *, num_prompts: int, num_tokens: int) -> list[tuple[Pull, Pull, Pull]]:
    """Each prompt layer by layer, one without rows, and the prompt again; the first of all is warm-up."""
    rng, pulled = random.Random(SEED), []
    async with InferenceClient(address) as client:
        snapshot = await client.cluster()
    prefill = next(member for member in snapshot.members if member.role == control_pb2.ROLE_PREFILL)
    metadata = Handshake(model=snapshot.model.fingerprint, page_tokens=PAGE_TOKENS).to_metadata()
    async with grpc.aio.insecure_channel(prefill.address, options=CHANNEL_OPTIONS) as channel:
        for _ in range(num_prompts + 1):
            prompt, other = random_prompt(rng, num_tokens), random_prompt(rng, num_tokens)
            layered = await pull(channel, metadata, prompt)
            without = await pull(channel, metadata, other, first_wanted_row=num_tokens)
            pulled.append((layered, without, await pull(channel, metadata, prompt)))
    return pulled[1:]


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Ids of bytes."""
    return [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_tokens)]


async def pull(
    channel: grpc.aio.Channel,
    metadata: tuple[tuple[str, str], ...],
    prompt: Sequence[int],
    *,
    first_wanted_row: int = 0,
) -> Pull:
    """Pulls as a decode worker does."""
    request = attention_pb2.SequenceRequest(
        request_id=uuid.uuid4().hex,
        token_ids=prompt,
        max_tokens=1,
        first_wanted_row=first_wanted_row,
    )
    ask: grpc.aio.UnaryStreamMultiCallable[attention_pb2.SequenceRequest, bytes] = channel.unary_stream(
        PREFILL_METHOD, request_serializer=attention_pb2.SequenceRequest.SerializeToString
    )
    fence = Fence(request_id=request.request_id, attempt=0, transfer=0)
    frames: list[Came] = []
    began_s = time.perf_counter()
    async for data in ask(request, metadata=metadata):
        item = decode_transfer(fence, data)
        if isinstance(item, CacheRows):
            frames.append(Came(time.perf_counter() - began_s, len(data), item.first_token_idx))
        elif isinstance(item, NewToken):
            return Pull(frames=tuple(frames), token_s=time.perf_counter() - began_s)
    raise SystemExit("the prefill worker sent no token")


def compare(pulled: Sequence[tuple[Pull, Pull, Pull]], *, gbit: float) -> Result:
    """Both ways on a link of so many Gbit/s; infinite is what was measured."""
    bytes_per_s = gbit * 1e9 / 8
    layered_s = [max(layered.token_s, last_row_s(layered.frames, bytes_per_s)) for layered, _, _ in pulled]
    late_s = [w.token_s + last_row_s(from_the_first(again), bytes_per_s) for _, w, again in pulled]
    return Result(
        link="loopback" if math.isinf(gbit) else f"{gbit:g} Gbit/s",
        layer_by_layer_ms=median_ms(layered_s),
        after_the_last_ms=median_ms(late_s),
    )


def from_the_first(again: Pull) -> list[Came]:
    """Frames of rows that are all there, in seconds since the first was made: between n of them lie n - 1."""
    # Of the last page, rows and token are computed once more: not of this.
    frames = [frame for frame in again.frames if frame.first_token_idx == 0]
    each_s = (frames[-1].at_s - frames[0].at_s) / max(len(frames) - 1, 1)
    return [frame._replace(at_s=frame.at_s - frames[0].at_s + each_s) for frame in frames]


def last_row_s(frames: Iterable[Came], bytes_per_s: float) -> float:
    """When the last row is there: a frame of 10 s, behind one that has the link until 4, is there at 14."""
    free_s = 0.0
    for frame in frames:
        free_s = max(free_s, frame.at_s) + frame.num_bytes / bytes_per_s
    return free_s


def median_ms(seconds: Iterable[float]) -> float:
    """Of the prompts."""
    return 1000 * statistics.median(seconds)


def show(facts: dict[str, object], results: list[Result]) -> None:
    """The report as a table."""
    table = Table("link", "layer by layer, ms", "after the last layer, ms", "saved")
    for result in results:
        saved = 1 - result.layer_by_layer_ms / result.after_the_last_ms
        values = f"{result.layer_by_layer_ms:.0f}", f"{result.after_the_last_ms:.0f}", f"{saved:.0%}"
        table.add_row(result.link, *values)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)


if __name__ == "__main__":
    typer.run(main)
