"""What prefix reuse brings: the first token of a prompt whose beginning is cached."""

import queue
import random
import time
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from tests.unit.workers.attention.harness import make_spec
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.engine import Engine
from workers.attention.types import Event, NewToken
from workers.config import AttentionConfig

NANO = Path(__file__).parents[3] / "assets" / "nano"
NUM_CACHED = 4096
MOST_OF_COLD_TIME = 0.15


def first_token(engine: Engine, prompt: list[int], request_id: str) -> tuple[NewToken, float]:
    """The first new token, and the seconds until it came."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    began_s = time.perf_counter()
    engine.submit(make_spec(prompt, request_id=request_id, max_tokens=1), events.put)
    while True:
        event = events.get(timeout=60)
        if isinstance(event, NewToken):
            return event, time.perf_counter() - began_s


@pytest.mark.parametrize("num_more", [1, 100])
def test_first_token_behind_4k_cached_tokens_takes_a_fraction_of_the_cold_time(num_more: int) -> None:
    """Measured: 0.3 % with one token more, 5 % with a hundred."""
    rng = random.Random(num_more)
    engine = build_whole_engine(
        Checkpoint.open(NANO),
        config=EngineConfig(group=AttentionConfig(num_pages=600)),
        metrics=Metrics("attention"),
    )
    engine.start()
    try:
        first_token(engine, rng.choices(range(3, 300), k=100), "warm-up")
        common = rng.choices(range(3, 300), k=NUM_CACHED)
        cold, cold_s = first_token(engine, [*common, *rng.choices(range(3, 300), k=num_more)], "cold")
        warm, warm_s = first_token(engine, [*common, *rng.choices(range(3, 300), k=num_more)], "warm")
    finally:
        engine.stop()
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, NUM_CACHED)
    assert warm_s <= MOST_OF_COLD_TIME * cold_s
