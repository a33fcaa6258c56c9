"""Time of a hand-over of cache rows between two processes, in frames and over NIXL.

    .venv/bin/python benchmarks/handover.py [--tokens 4096] [--size bench-1b] [--json]

The sender and the receiver are those of the workers; nothing is computed: the rows lie ready, chunk by chunk
and layer by layer, and the receiver copies them into a cache. UCX chooses its own way unless UCX_TLS does.
"""

import asyncio
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import grpc
import grpc.aio
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks._cluster import machine
from model.config import ModelConfig
from model.sizes import SizeName, hf_config
from wire.frames import Array
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import attention_pb2
from wire.rpc import ATTENTION_FRAMES, SERVER_OPTIONS
from workers.attention.drain import Door
from workers.attention.engine import Engine
from workers.attention.kv_receive import KvReceiver
from workers.attention.kv_send import KvSender
from workers.attention.kv_stage import KvStage
from workers.attention.nixl_link import open_link
from workers.attention.relay import EventRelay
from workers.attention.types import CacheRows, Key, NewToken, Sampling, SequenceSpec, Sink, Source
from workers.config import KvConfig

SEED = 0
TRANSPORTS: tuple[Literal["grpc", "nixl"], ...] = ("grpc", "nixl")
LEASE_S = 30.0


@dataclass(frozen=True)
class Shape:
    """What is handed over."""

    size: SizeName
    num_tokens: int
    chunk_tokens: int

    @property
    def model(self) -> ModelConfig:
        """Whose rows they are."""
        return ModelConfig.from_hf(hf_config(self.size, dtype="float32"))

    @property
    def width(self) -> int:
        """Places of a row."""
        return self.model.cache_layout().width

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return self.model.num_cache_layers * self.num_tokens * self.width * 4

    def spec(self, request_id: str, source: Source) -> SequenceSpec:
        """A request for them."""
        return SequenceSpec(
            request_id=request_id,
            attempt=0,
            token_ids=(5,) * self.num_tokens,
            num_prompt_tokens=self.num_tokens,
            max_tokens=1,
            stop_token_ids=frozenset(),
            sampling=Sampling(),
            source=source,
        )


@dataclass(frozen=True)
class Computed:
    """An engine whose prefills are over at once."""

    shape: Shape
    chunk_TB: Array

    def submit(self, spec: SequenceSpec, sink: Sink) -> None:
        """Tells of every chunk of every layer."""
        for begin in range(0, self.shape.num_tokens, self.shape.chunk_tokens):
            rows_TB = self.chunk_TB[: self.shape.num_tokens - begin]
            for layer_idx in range(self.shape.model.num_cache_layers):
                sink(CacheRows(layer_idx, begin, rows_TB))
        sink(NewToken(7, None))

    def cancel(self, spec: SequenceSpec) -> None:
        """Nothing is left to do."""


@dataclass
class Filling:
    """An engine that keeps rows."""

    shape: Shape
    is_filled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.model = self.shape.model
        self.cache = SimpleNamespace(width=self.shape.width, dtype_name="float32")
        layers = self.model.num_cache_layers
        self.rows_LTB = np.zeros((layers, self.shape.num_tokens, self.shape.width), dtype=np.float32)

    def add_rows(self, key: Key, rows: CacheRows) -> None:
        """Copies rows to where they belong."""
        begin = rows.first_token_idx
        self.rows_LTB[rows.layer_idx, begin : begin + len(rows.rows_TB)] = rows.rows_TB

    def finish_transfer(self, key: Key, token: NewToken) -> None:
        """All rows are here."""
        self.is_filled.set()


def leave(connection: Connection, shape: Shape, transport: Literal["grpc", "nixl"]) -> None:
    """A process that sends; says its address, and at the end its CPU seconds since."""
    asyncio.run(_leave(connection, shape, transport))


async def _leave(connection: Connection, shape: Shape, transport: Literal["grpc", "nixl"]) -> None:
    link = open_link("prefill-0", KvConfig(transport=transport))
    chunk_TB = np.random.default_rng(SEED).standard_normal(
        (shape.chunk_tokens, shape.width), dtype=np.float32
    )
    sender = KvSender(
        engine=cast(Engine, Computed(shape, chunk_TB)),
        relay=EventRelay(),
        door=Door("prefill-0"),
        lease_s=LEASE_S,
        metrics=Metrics("attention"),
        stage=None if link is None else KvStage(link, wait_s=LEASE_S),
    )

    async def prefill(request: attention_pb2.SequenceRequest, context: Any) -> None:
        spec = shape.spec(request.request_id, Source.PREFILL_ONLY)
        await sender.send(spec, request.transfer, context, nixl_bytes=request.nixl_bytes)

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
        prefill, request_deserializer=attention_pb2.SequenceRequest.FromString
    )
    handlers = grpc.method_handlers_generic_handler(ATTENTION_FRAMES, {"Prefill": handler})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection.send(f"127.0.0.1:{port}")
    began_s = time.process_time()
    await asyncio.to_thread(connection.recv)
    connection.send(time.process_time() - began_s)
    await server.stop(None)
    if link is not None:
        link.close()


async def _receive(
    address: str, shape: Shape, transport: Literal["grpc", "nixl"], repeats: int
) -> tuple[list[float], float]:
    link = open_link("decode-0", KvConfig(transport=transport))
    engine, metrics = Filling(shape), Metrics("attention")
    seconds: list[float] = []
    receiver = KvReceiver(
        engine=cast(Engine, engine),
        handshake=Handshake(model="bench", page_tokens=16),
        lease_s=LEASE_S,
        metrics=metrics,
        link=link,
    )
    cpu_s = time.process_time()
    for repeat in range(repeats + 1):
        engine.is_filled.clear()
        request = attention_pb2.SequenceRequest(request_id=f"r{repeat}", prefill_address=address)
        began_s = time.perf_counter()
        await receiver.receive(
            shape.spec(request.request_id, Source.REMOTE),
            request,
            first_row=0,
            came_s=asyncio.get_running_loop().time(),
            on_error=_give_up,
        )
        if metrics.counter("kv_transfers_total", result="received")._value.get() != repeat + 1:
            raise SystemExit("a hand-over was refused")
        if repeat:
            seconds.append(time.perf_counter() - began_s)
    cpu_s = time.process_time() - cpu_s
    await receiver.close()
    if link is not None:
        link.close()
    return seconds, cpu_s


def _give_up(error: Exception) -> None:
    raise SystemExit(str(error))


def measure(shape: Shape, transport: Literal["grpc", "nixl"], repeats: int) -> dict[str, Any]:
    """Seconds of each hand-over, after one that warms up, and CPU seconds of both sides together."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    sender = context.Process(target=leave, args=(there, shape, transport))
    sender.start()
    address = here.recv()
    seconds, cpu_s = asyncio.run(_receive(address, shape, transport, repeats))
    here.send("end")
    cpu_s += here.recv()
    sender.join()
    return {"transport": transport, "seconds": seconds, "cpu_s": cpu_s / (repeats + 1)}


def main(
    tokens: Annotated[int, typer.Option(min=1)] = 4096,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of one step of the prefill worker.")] = 512,
    size: Annotated[str, typer.Option(help="Whose rows: a size of `moray checkpoint make`.")] = "bench-1b",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="New processes; transports take turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures both transports."""
    shape = Shape(cast(SizeName, size), tokens, chunk)
    rows = [measure(shape, transport, repeats) for _ in range(rounds) for transport in TRANSPORTS]
    facts = {
        "machine": machine(),
        "seed": SEED,
        "tokens": tokens,
        "size": size,
        "chunk": chunk,
        "bytes": shape.num_bytes,
        "ucx_tls": os.environ.get("UCX_TLS", "UCX's choice"),
    }
    if as_json:
        typer.echo(json.dumps({**facts, "results": rows}))
        return
    table = Table("transport", "median, ms", "least, ms", "most, ms", "GB/s", "CPU ms")
    for transport in TRANSPORTS:
        mine = [row for row in rows if row["transport"] == transport]
        seconds = [second_s for row in mine for second_s in row["seconds"]]
        median_s = statistics.median(seconds)
        times = [f"{1e3 * value:.0f}" for value in (median_s, min(seconds), max(seconds))]
        cpu_ms = 1e3 * statistics.median(row["cpu_s"] for row in mine)
        table.add_row(transport, *times, f"{shape.num_bytes / median_s / 1e9:.2f}", f"{cpu_ms:.0f}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    typer.run(main)
