"""Traces of real requests in Mooncake's format: JSON lines with `timestamp` (ms), lengths and block hashes.

    {"timestamp": 3000, "input_length": 915, "output_length": 355, "hash_ids": [0, 462]}

Each hash id stands for a block of 512 tokens: prompts with the same leading ids have the same leading tokens.
The text is not in the trace, so a block's tokens are drawn from a generator that is seeded by its id.

Source: Mooncake (FAST'25), FAST25-release/traces in github.com/kvcache-ai/Mooncake.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cluster.bench.load.arrivals import random_tokens
from cluster.bench.load.types import LoadRequest
from wire.errors import ConfigError

BLOCK_TOKENS = 512
_CACHED_BLOCKS = 4096


@dataclass(frozen=True, kw_only=True)
class TraceRules:
    """How a trace becomes requests."""

    speed: float = 1.0
    """2 = twice as many requests a second as in the trace."""
    token_scale: float = 1.0
    """Of prompts, answers and blocks: 0.03125 makes blocks of 16 tokens, for models of short context."""
    num_requests: int = 0
    """Only the first so many; 0 = all."""
    seed: int = 0

    @property
    def block_tokens(self) -> int:
        """Tokens that a hash id stands for."""
        return max(1, round(BLOCK_TOKENS * self.token_scale))


@dataclass(frozen=True, kw_only=True)
class TracedRequest:
    """One line of a trace."""

    at_ms: float
    prompt_tokens: int
    new_tokens: int
    block_ids: tuple[int, ...]


def read_trace(lines: Iterable[str], *, name: str) -> list[TracedRequest]:
    """The requests of a trace; empty lines are skipped.

    Args:
        lines: of the file.
        name: of the file, for errors.

    Raises:
        ConfigError: a line is not what the format wants; names it. Or there is none.
    """
    requests = [
        _read_line(line, where=f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not requests:
        raise ConfigError(field="--trace", wanted="at least one request", given=f"{name}, which has none")
    return sorted(requests, key=lambda request: request.at_ms)


def _read_line(line: str, *, where: str) -> TracedRequest:
    try:
        raw = json.loads(line)
        request = TracedRequest(
            at_ms=float(raw["timestamp"]),
            prompt_tokens=int(raw["input_length"]),
            new_tokens=int(raw["output_length"]),
            block_ids=tuple(map(int, raw.get("hash_ids", ()))),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_line(where, f"{type(error).__name__}: {error}") from error
    if request.at_ms < 0 or request.prompt_tokens < 1 or request.new_tokens < 1:
        raise _bad_line(where, "a negative time, or a length below 1")
    return request


def _bad_line(where: str, given: str) -> ConfigError:
    wanted = "lines with timestamp, input_length, output_length and hash_ids (docs/load.md)"
    return ConfigError(field="--trace", wanted=wanted, given=f"{given} at {where}")


def requests_of(
    traced: Iterable[TracedRequest], *, vocab_tokens: int, rules: TraceRules
) -> list[LoadRequest]:
    """The requests that a trace stands for, the first of them due at once.

    Example: a block of 512 at a scale of 1/32 is 16 tokens; 915 tokens of blocks [0, 462] become 29, of which
    16 are those of every prompt that begins with block 0.
    """
    kept = list(traced)[: rules.num_requests or None]

    @lru_cache(_CACHED_BLOCKS)
    def block(block_id: str) -> tuple[int, ...]:
        rng = random.Random(f"{rules.seed} {block_id}")
        return random_tokens(rules.block_tokens, vocab_tokens=vocab_tokens, rng=rng)

    def prompt(idx: int, request: TracedRequest) -> tuple[int, ...]:
        num_tokens = max(1, round(request.prompt_tokens * rules.token_scale))
        num_blocks = -(-num_tokens // rules.block_tokens)
        # Blocks that the trace does not name are nobody else's.
        ids = [str(i) for i in request.block_ids[:num_blocks]]
        ids += [f"{idx} own {i}" for i in range(num_blocks - len(ids))]
        return tuple(token for block_id in ids for token in block(block_id))[:num_tokens]

    begin_ms = kept[0].at_ms if kept else 0.0
    return [
        LoadRequest(
            at_s=(request.at_ms - begin_ms) / 1e3 / rules.speed,
            prompt=prompt(idx, request),
            max_tokens=max(1, round(request.new_tokens * rules.token_scale)),
        )
        for idx, request in enumerate(kept)
    ]
