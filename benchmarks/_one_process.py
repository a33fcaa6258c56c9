"""A model whole in this process, answering greedily: what clusters are compared with."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model.precision import Precision
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.engine import Engine
from workers.attention.types import Event, Failed, NewToken, Sampling, SequenceSpec, Source
from workers.checkpoint import open_checkpoint
from workers.config import AttentionConfig, ComputeConfig, KvConfig


@contextmanager
def one_process(
    path: Path,
    *,
    num_pages: int = 1024,
    num_threads: int = 1,
    dtype: Precision = "auto",
    prefix_reuse: bool = True,
) -> Iterator[Engine]:
    """The engine of a checkpoint, every expert in it."""
    checkpoint = open_checkpoint(path)
    config = EngineConfig(
        group=AttentionConfig(num_pages=num_pages, num_threads=num_threads),
        compute=ComputeConfig(dtype=dtype),
        kv=KvConfig(prefix_reuse=prefix_reuse),
    )
    engine = build_whole_engine(checkpoint, config=config, metrics=Metrics("attention"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def greedy(
    engine: Engine, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: frozenset[int] = frozenset()
) -> list[list[int]]:
    """New tokens of every prompt, all asked at once; a stop token is the last of its answer."""
    sinks: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in prompts]
    for i, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
        spec = SequenceSpec(
            request_id=f"{i}",
            attempt=0,
            token_ids=tuple(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            stop_token_ids=stop,
            sampling=Sampling(),
            source=Source.LOCAL,
        )
        engine.submit(spec, sink.put)
    return [_read(sink) for sink in sinks]


def _read(sink: "queue.SimpleQueue[Event]") -> list[int]:
    tokens: list[int] = []
    while True:
        event = sink.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, NewToken):
            tokens.append(event.token_id)
            if event.finish is not None:
                return tokens
