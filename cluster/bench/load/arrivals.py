"""When requests arrive, and requests of random tokens for those moments. Pure: the generator is given."""

import random
from dataclasses import dataclass

from cluster.bench.load.types import Arrivals, LoadRequest
from wire.errors import ConfigError

FIRST_TOKEN_ID = 3
"""Ids below are special ones."""


@dataclass(frozen=True, kw_only=True)
class SyntheticLoad:
    """Requests of random tokens."""

    arrivals: Arrivals
    num_requests: int
    rate_per_s: float
    """Of arrivals, on average."""
    burstiness: float = 1.0
    """Shape of gamma arrivals: 1 = poisson, smaller = in bursts, larger = more even."""
    prompt_tokens: int
    new_tokens: int
    spread: float = 0.0
    """Lengths are drawn from n (1 - spread) to n (1 + spread), evenly."""
    shared_tokens: int = 0
    """Leading tokens that all prompts have in common, at most all but one."""


def plan_arrivals(load: SyntheticLoad, rng: random.Random) -> list[float]:
    """The moments at which requests are due, in seconds, the first one after the first gap.

    Example: constant at 4 a second: 0.25, 0.5, 0.75, ...

    Source: gamma gaps of mean 1 / rate and coefficient of variation 1 / sqrt(burstiness), as in vLLM's
    serving benchmark.
    """
    moments, now_s = [], 0.0
    for _ in range(load.num_requests):
        now_s += _gap_s(load, rng)
        moments.append(now_s)
    return moments


def _gap_s(load: SyntheticLoad, rng: random.Random) -> float:
    match load.arrivals:
        case "poisson":
            return rng.expovariate(load.rate_per_s)
        case "gamma":
            return rng.gammavariate(load.burstiness, 1 / (load.rate_per_s * load.burstiness))
        case "constant":
            return 1 / load.rate_per_s


def make_requests(load: SyntheticLoad, *, vocab_tokens: int, rng: random.Random) -> list[LoadRequest]:
    """The requests of a load, in order of arrival.

    Raises:
        ConfigError: prompts have no token of their own.
    """
    if load.shared_tokens >= round(load.prompt_tokens * (1 - load.spread)):
        wanted = "fewer than the shortest prompt has (--prompt-tokens, --spread)"
        raise ConfigError(field="--shared-tokens", wanted=wanted, given=str(load.shared_tokens))
    shared = random_tokens(load.shared_tokens, vocab_tokens=vocab_tokens, rng=rng)

    def length(mean_tokens: int) -> int:
        return max(1, round(mean_tokens * rng.uniform(1 - load.spread, 1 + load.spread)))

    return [
        LoadRequest(
            at_s=at_s,
            prompt=shared
            + random_tokens(length(load.prompt_tokens) - len(shared), vocab_tokens=vocab_tokens, rng=rng),
            max_tokens=length(load.new_tokens),
        )
        for at_s in plan_arrivals(load, rng)
    ]


def random_tokens(num: int, *, vocab_tokens: int, rng: random.Random) -> tuple[int, ...]:
    """Ids that are no special ones."""
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab_tokens) for _ in range(num))
