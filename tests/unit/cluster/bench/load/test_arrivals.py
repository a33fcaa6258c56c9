"""Moments and prompts of random loads: right on average, the same for the same seed."""

import random
import statistics
from dataclasses import replace

import pytest

from cluster.bench.load.arrivals import SyntheticLoad, make_requests, plan_arrivals
from cluster.bench.load.types import Arrivals
from wire.errors import ConfigError

VOCAB_TOKENS = 500
LOAD = SyntheticLoad(
    arrivals="poisson", num_requests=4000, rate_per_s=5.0, prompt_tokens=20, new_tokens=8, spread=0.5
)
GAPS: list[tuple[Arrivals, float, float]] = [
    ("poisson", 1.0, 1.0),
    ("gamma", 1.0, 1.0),
    ("gamma", 0.25, 2.0),
    ("gamma", 4.0, 0.5),
    ("constant", 1.0, 0.0),
]


@pytest.mark.parametrize(("arrivals", "burstiness", "variation"), GAPS)
def test_gaps_have_the_mean_and_the_variation_that_was_asked(
    arrivals: Arrivals, burstiness: float, variation: float
) -> None:
    moments = plan_arrivals(replace(LOAD, arrivals=arrivals, burstiness=burstiness), random.Random(1))
    gaps = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 5, rel=0.1)
    assert statistics.pstdev(gaps) * 5 == pytest.approx(variation, rel=0.1, abs=1e-6)


def test_constant_arrivals_are_evenly_apart() -> None:
    load = replace(LOAD, arrivals="constant", num_requests=3, rate_per_s=4.0)
    assert plan_arrivals(load, random.Random(0)) == [0.25, 0.5, 0.75]


def make(load: SyntheticLoad, seed: int = 2) -> list[tuple[float, tuple[int, ...], int]]:
    made = make_requests(load, vocab_tokens=VOCAB_TOKENS, rng=random.Random(seed))
    return [(request.at_s, request.prompt, request.max_tokens) for request in made]


def test_lengths_spread_evenly_around_the_mean() -> None:
    requests = make(LOAD)
    lengths = [len(prompt) for _, prompt, _ in requests]
    assert (min(lengths), max(lengths)) == (10, 30)
    assert statistics.fmean(lengths) == pytest.approx(20, rel=0.05)
    assert {new for _, _, new in requests} == set(range(4, 13))


def test_ids_are_inside_the_vocabulary_and_not_special() -> None:
    ids = {token for _, prompt, _ in make(LOAD) for token in prompt}
    assert (min(ids), max(ids)) == (3, VOCAB_TOKENS - 1)


def test_the_same_seed_makes_the_same_load_and_another_seed_another() -> None:
    assert make(LOAD) == make(LOAD)
    assert make(LOAD) != make(LOAD, seed=3)


def test_shared_tokens_begin_every_prompt_and_nothing_else_is_shared() -> None:
    prompts = [prompt for _, prompt, _ in make(replace(LOAD, num_requests=50, shared_tokens=9, spread=0.0))]
    assert len({prompt[:9] for prompt in prompts}) == 1
    assert len({prompt[9:13] for prompt in prompts}) == 50
    assert {len(prompt) for prompt in prompts} == {20}


def test_prompts_need_tokens_of_their_own() -> None:
    with pytest.raises(ConfigError, match="--shared-tokens"):
        make(replace(LOAD, shared_tokens=10))
