"""From what became of every request to the figures of a load. Pure."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from cluster.bench.load.types import Objectives, Outcome


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of some durations, in milliseconds; zeros when there were none."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    highest: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How many requests were somewhere, over the time of the load."""

    mean: float
    highest: int


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The figures of one load."""

    duration_s: float
    """From the beginning to the end of the last request."""
    num_requests: int
    num_done: int
    num_refused: int
    num_failed: int
    errors: dict[str, int]
    """What those without a whole answer were told -> how many."""
    ttft_ms: Spread
    """From when a request was due to its first token."""
    itl_ms: Spread
    """Between two tokens of an answer; tokens of one message have no time between them."""
    answer_ms: Spread
    """From when a request was due to its last token."""
    refusal_ms: Spread
    """From when a refused request was sent to its refusal."""
    retry_after_ms: Spread
    """When refused requests were told to try again, where they were."""
    late_ms: Spread
    """How much later than due requests were sent: large values are the load generator's own."""
    requests_per_s: float
    """Whole answers."""
    prompt_tokens_per_s: float
    new_tokens_per_s: float
    objectives: Objectives
    good_requests_per_s: float
    """Whole answers that kept the objectives."""
    good_share: float
    """Of all requests, refused ones too."""
    waiting: Depth
    """Sent, and no token yet."""
    running: Depth
    """A token is there, the last is not."""
    num_prompt_tokens: int
    num_cached_tokens: int
    cached_share: float
    """Of the prompts' tokens, those that were not computed again."""

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return asdict(self)


def make_report(outcomes: Sequence[Outcome], *, objectives: Objectives) -> LoadReport:
    """The figures.

    Args:
        outcomes: of every request.
        objectives: which answers count as good.
    """
    done = [outcome for outcome in outcomes if outcome.is_done]
    refused = [outcome for outcome in outcomes if outcome.is_refused]
    duration_s = max((outcome.ended_s for outcome in outcomes), default=0.0)
    num_good = sum(map(objectives.are_met, outcomes))
    num_prompt = sum(outcome.num_prompt_tokens for outcome in done)
    num_cached = sum(outcome.num_cached_tokens for outcome in done)
    per_s = 1 / duration_s if duration_s else 0.0
    return LoadReport(
        duration_s=duration_s,
        num_requests=len(outcomes),
        num_done=len(done),
        num_refused=len(refused),
        num_failed=len(outcomes) - len(done) - len(refused),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        ttft_ms=spread_ms(outcome.ttft_s for outcome in done),
        itl_ms=spread_ms(chain.from_iterable(outcome.gaps_s for outcome in done)),
        answer_ms=spread_ms(outcome.token_s[-1] - outcome.due_s for outcome in done),
        refusal_ms=spread_ms(outcome.ended_s - outcome.sent_s for outcome in refused),
        retry_after_ms=spread_ms(outcome.retry_after_s for outcome in refused if outcome.retry_after_s),
        late_ms=spread_ms(outcome.sent_s - outcome.due_s for outcome in outcomes),
        requests_per_s=len(done) * per_s,
        prompt_tokens_per_s=num_prompt * per_s,
        new_tokens_per_s=sum(len(outcome.token_s) for outcome in outcomes) * per_s,
        objectives=objectives,
        good_requests_per_s=num_good * per_s,
        good_share=num_good / max(len(outcomes), 1),
        waiting=depth(waiting_steps(outcomes), duration_s),
        running=depth(running_steps(outcomes), duration_s),
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        cached_share=num_cached / max(num_prompt, 1),
    )


def spread_ms(durations_s: Iterable[float]) -> Spread:
    """Mean and percentiles: of n sorted values, p99 is the one at ceil(0.99 n): 99 % are not above it.

    Example: of 1 ms to 100 ms, p50 is 50 ms and p99 is 99 ms.
    """
    values = sorted(1e3 * duration_s for duration_s in durations_s)
    if not values:
        return Spread()

    def percentile(percent: int) -> float:
        return values[max(-(-len(values) * percent // 100), 1) - 1]

    return Spread(
        mean=statistics.fmean(values),
        p50=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        highest=values[-1],
    )


Steps = list[tuple[float, int]]
"""(second, how many then), in order of time; nothing before the first."""


def waiting_steps(outcomes: Iterable[Outcome]) -> Steps:
    """How many requests were sent and had no token yet."""
    stays = ((o.sent_s, o.token_s[0] if o.token_s else o.ended_s) for o in outcomes)
    return _steps(stays)


def running_steps(outcomes: Iterable[Outcome]) -> Steps:
    """How many requests had a token and were not over."""
    return _steps((o.token_s[0], o.ended_s) for o in outcomes if o.token_s)


def _steps(stays: Iterable[tuple[float, float]]) -> Steps:
    changes: Counter[float] = Counter()
    for begin_s, end_s in stays:
        changes[begin_s] += 1
        changes[end_s] -= 1
    steps, count = [], 0
    for moment_s in sorted(changes):
        count += changes[moment_s]
        steps.append((moment_s, count))
    return steps


def depth(steps: Steps, duration_s: float) -> Depth:
    """Mean over time, and the most; both count from 0 s to `duration_s`."""
    ends = [moment_s for moment_s, _ in steps[1:]] + [duration_s]
    area = (
        sum(count * (end_s - begin_s) for (begin_s, count), end_s in zip(steps, ends, strict=True))
        if steps
        else 0
    )
    return Depth(mean=area / duration_s if duration_s else 0.0, highest=max((n for _, n in steps), default=0))
