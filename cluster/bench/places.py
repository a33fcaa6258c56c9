"""The two places that are measured: one process, and a cluster as deployed."""

import asyncio
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.bench.streams import Ask, Moments
from cluster.client import GenerateOptions, InferenceClient
from cluster.config import MorayConfig
from cluster.lifecycle import check_model, start_cluster
from model.checkpoint import Checkpoint
from model.precision import Precision
from model.profile import StepClock
from wire.errors import NotReady
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.engine import Engine
from workers.attention.types import Event, Failed, NewToken, Sampling, SequenceSpec, Source
from workers.config import AttentionConfig, ComputeConfig, KvConfig

PAGE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """What is measured, beside where."""

    dtype: Precision
    num_threads: int
    """Of the process; of each worker of a cluster."""
    num_cached_tokens: int
    """Tokens that must fit into the cache at once."""
    step_tokens: int
    """Tokens of one step at most."""
    num_requests: int
    """Requests at the same time."""

    def group(self) -> AttentionConfig:
        """The attention workers of it.

        Raises:
            ConfigError: a number is out of range.
        """
        return AttentionConfig.from_mapping(
            {
                "num_threads": self.num_threads,
                "num_pages": -(-self.num_cached_tokens // PAGE_TOKENS) + self.num_requests,
                "max_batch_requests": self.num_requests,
                "max_step_tokens": self.step_tokens,
            }
        )


@contextmanager
def in_process(
    checkpoint: Checkpoint,
    place: Place,
    *,
    clock: StepClock | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Ask]:
    """An engine with every expert in this process."""
    config = EngineConfig(
        group=place.group(),
        compute=ComputeConfig(dtype=place.dtype),
        kv=KvConfig(page_tokens=PAGE_TOKENS),
    )
    engine = build_whole_engine(
        checkpoint, config=config, metrics=Metrics("attention"), clock=clock, on_progress=on_progress
    )
    engine.start()
    try:
        yield lambda prompts, num_tokens: _ask_engine(engine, prompts, num_tokens, clock)
    finally:
        engine.stop()


def _ask_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, clock: StepClock | None
) -> Moments:
    """The first prompt's tokens mark the clock: one of them comes in every step that decodes."""
    arrived: list[queue.SimpleQueue[tuple[float, Event]]] = [queue.SimpleQueue() for _ in prompts]

    def submit(i: int, prompt: Sequence[int]) -> None:
        spec = SequenceSpec(
            request_id=str(i),
            attempt=0,
            token_ids=tuple(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=num_tokens,
            stop_token_ids=frozenset(),
            sampling=Sampling(),
            source=Source.LOCAL,
        )
        engine.submit(spec, lambda event: hear(i, event))

    def hear(i: int, event: Event) -> None:
        now_s = time.perf_counter()
        if clock is not None and i == 0 and isinstance(event, NewToken):
            clock.mark(now_s)
        arrived[i].put((now_s, event))

    for i, prompt in enumerate(prompts):
        submit(i, prompt)
    return [_moments(events) for events in arrived]


def _moments(events: "queue.SimpleQueue[tuple[float, Event]]") -> list[float]:
    moments = []
    while True:
        moment_s, event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, NewToken):
            moments.append(moment_s)
            if event.finish is not None:
                return moments


@contextmanager
def in_cluster(model: str, place: Place, *, num_experts: int) -> Iterator[Ask]:
    """A router, one attention worker and expert workers, started for it and ended.

    Expert workers compute at the same time, so they divide the threads between them.

    Raises:
        MorayError: it did not start; says why.
    """
    expert_threads = max(1, place.num_threads // num_experts)
    config = MorayConfig.from_mapping(
        {
            "model": model,
            "name": "moray-bench",
            "compute": {"dtype": place.dtype},
            "kv": {"page_tokens": PAGE_TOKENS},
            "expert": {"replicas": num_experts, "num_threads": expert_threads},
            "prefill": {"replicas": 0},
            "decode": {"replicas": 0},
            "both": place.group().model_dump() | {"replicas": 1},
            "router": {"grpc_port": 0, "http_port": 0},
        }
    )
    with running_cluster(config) as address:
        yield lambda prompts, num_tokens: asyncio.run(_ask_router(address, prompts, num_tokens))


@contextmanager
def running_cluster(config: MorayConfig) -> Iterator[str]:
    """A cluster that ends with the block; the address of its router.

    Raises:
        MorayError: it did not start; says why.
    """
    cluster = start_cluster(config, check_model(config))
    try:
        status = cluster.wait_ready(deadline_s=config.controller.start_s, on_progress=lambda _: None)
        addresses = [address for name, address in status.addresses.items() if name.startswith("router")]
        if not addresses:
            raise NotReady(f"no router among {sorted(status.addresses)}")
        yield addresses[0]
    finally:
        cluster.stop()


async def _ask_router(address: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
    async def ask(client: InferenceClient, prompt: Sequence[int]) -> list[float]:
        moments: list[float] = []
        async for response in client.stream(prompt, options):
            moments += [time.perf_counter()] * len(response.token_ids)
        return moments

    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    async with InferenceClient(address) as client:
        return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
