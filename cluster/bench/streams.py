"""Prompts sent to something that answers in tokens, and the moments at which the tokens came."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from model.profile import PARTS, StepClock
from wire.errors import ConfigError

Moments = list[list[float]]
"""For each prompt the seconds at which its new tokens came."""
Ask = Callable[[Sequence[Sequence[int]], int], Moments]
"""Sends all prompts at once and waits for so many new tokens of each, end tokens ignored."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second over several runs."""

    median: float
    lowest: float
    highest: float


def random_prompts(num: int, *, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids, special ones left out."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(num_tokens)] for _ in range(num)]


def prefill_rates(asks: Sequence[Ask], prompts: Sequence[Sequence[int]]) -> list[Rate]:
    """Of each place, prompt tokens per second until the first new token.

    One prompt after another, and of each the places in turns; the first prompt warms up.
    """

    def rate(ask: Ask, prompt: Sequence[int]) -> float:
        began_s = time.perf_counter()
        first_s = ask([prompt], 1)[0][0]
        return len(prompt) / (first_s - began_s)

    rounds = [partial(rate, prompt=prompt) for prompt in prompts]
    return [_rate(rates[1:] or rates) for rates in _in_turns(asks, rounds)]


def decode_rates(
    asks: Sequence[Ask], prompts: Sequence[Sequence[int]], *, num_tokens: int, repeats: int
) -> list[Rate]:
    """Of each place, new tokens per second of all prompts together, while every one of them is decoding.

    It is the sum of their rates, each from the first to the last of its tokens in that time: tokens of one
    step come one behind another, so a count between two moments would cut through the steps at both ends.
    The places take turns.

    Raises:
        ConfigError: so few tokens that the prompts did not decode together for a step.
    """

    def rate(ask: Ask) -> float:
        moments = ask(prompts, num_tokens)
        begin_s, end_s = _together(moments)
        inside = [[moment for moment in times if begin_s <= moment <= end_s] for times in moments]
        if not all(times and times[0] < times[-1] for times in inside):
            raise _too_few(num_tokens)
        return sum((len(times) - times.count(times[0])) / (times[-1] - times[0]) for times in inside)

    return [_rate(rates) for rates in _in_turns(asks, [rate] * repeats)]


def _in_turns(asks: Sequence[Ask], rounds: Sequence[Callable[[Ask], float]]) -> list[list[float]]:
    """For each place what it gave in every round; every second round begins with the last.

    A machine drifts by more than places differ; what runs in turns drifts together.
    """
    rates: list[list[float]] = [[] for _ in asks]
    for i, measure in enumerate(rounds):
        order = range(len(asks)) if i % 2 == 0 else reversed(range(len(asks)))
        for place in order:
            rates[place].append(measure(asks[place]))
    return rates


def prefill_profile(ask: Ask, prompt: Sequence[int], clock: StepClock) -> dict[str, float]:
    """Milliseconds of each part of the model for one prompt; `ask` marks the clock at every new token."""
    clock.marks.clear()
    clock.mark(time.perf_counter())
    ask([prompt], 1)
    return _mean_ms(clock.marks)


def decode_profile(
    ask: Ask, prompts: Sequence[Sequence[int]], clock: StepClock, *, num_tokens: int
) -> dict[str, float]:
    """Milliseconds of each part of the model in one step, while every prompt is decoding.

    Raises:
        ConfigError: so few tokens that the prompts did not decode together for a step.
    """
    clock.marks.clear()
    begin_s, end_s = _together(ask(prompts, num_tokens))
    marks = [mark for mark in clock.marks if begin_s <= mark[0] <= end_s]
    if len(marks) < 2:
        raise _too_few(num_tokens)
    return _mean_ms(marks)


def _together(moments: Moments) -> tuple[float, float]:
    """From the last prompt's first token to the first prompt's last one."""
    return max(times[0] for times in moments), min(times[-1] for times in moments)


def _too_few(num_tokens: int) -> ConfigError:
    wanted = "enough that all requests decode at the same time for a step or more"
    hint = "raise it, or --step-tokens, so that all prompts are read sooner"
    return ConfigError(field="--new-tokens", wanted=wanted, given=str(num_tokens), hint=hint)


def _mean_ms(marks: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """What passed from the first mark to the last, for each of the steps between them."""
    (begin_s, before), (end_s, after) = marks[0], marks[-1]
    parts: dict[str, float] = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in PARTS}
    parts["python"] = end_s - begin_s - sum(parts.values())
    return {part: 1e3 * part_s / (len(marks) - 1) for part, part_s in parts.items()}


def _rate(rates: Sequence[float]) -> Rate:
    return Rate(median=statistics.median(rates), lowest=min(rates), highest=max(rates))
