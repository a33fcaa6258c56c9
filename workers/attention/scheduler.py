"""The batch scheduler: which sequences run in the next step, and how many of their tokens. A pure decision.

Decoding sequences go first, one token each; prompt chunks fill what is left of the step's token budget, first
come, first served. A sequence gets all pages that it may ever need when it is admitted, so none is stopped
half-way for lack of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from workers.attention.types import Key, Phase


@dataclass(frozen=True)
class Candidate:
    """What the scheduler must know of a sequence, in order of arrival."""

    key: Key
    phase: Phase
    num_pending_tokens: int
    """Tokens to compute, >= 1 while in PREFILL or DECODE."""
    num_pages: int
    """Pages that it needs in all."""


@dataclass(frozen=True)
class StepLimits:
    """The bounds of one step."""

    max_batch_requests: int
    max_step_tokens: int
    micro_batches: int = 1
    """Parts of a step that take turns, at most."""


@dataclass(frozen=True)
class StepPlan:
    """The decision."""

    admit: tuple[Key, ...]
    """Waiting sequences that get their pages now."""
    run: tuple[tuple[Key, int], ...]
    """(sequence, tokens to compute) of this step."""


def plan_step(candidates: Sequence[Candidate], *, num_free_pages: int, limits: StepLimits) -> StepPlan:
    """Who is admitted and who runs.

    Example: limits of 8 tokens; two sequences decode, a third has 100 prompt tokens left: the step runs
    1 + 1 + 6 tokens.

    Args:
        candidates: every sequence, oldest first.
        num_free_pages: pages that can be given away.
        limits: bounds of the step.
    """
    admit = _plan_admission(candidates, num_free_pages)
    decoding = [c for c in candidates if c.phase is Phase.DECODE][
        : min(limits.max_batch_requests, limits.max_step_tokens)
    ]
    run: list[tuple[Key, int]] = [(c.key, 1) for c in decoding]
    budget_tokens = limits.max_step_tokens - len(run)
    for candidate in candidates:
        if candidate.phase is Phase.PREFILL and budget_tokens > 0:
            num_tokens = min(candidate.num_pending_tokens, budget_tokens)
            run.append((candidate.key, num_tokens))
            budget_tokens -= num_tokens
    return StepPlan(admit=admit, run=tuple(run))


def split_step(num_rows: Sequence[int], *, micro_batches: int) -> tuple[tuple[int, int], ...]:
    """Sequences [begin, end) of each micro-batch: about the same rows in each, no sequence in two.

    Example: rows 1, 1, 6, 1 in two parts: [0, 2) with 2 rows and [2, 4) with 7, as near to halves as whole
    sequences in their order come.

    Args:
        num_rows: of each sequence of the step, >= 1.
        micro_batches: how many parts at most, >= 1.
    """
    ends = list(accumulate(num_rows))
    wanted = [ends[-1] * (i + 1) / micro_batches for i in range(micro_batches - 1)] if ends else []
    cuts = {min(range(len(ends)), key=lambda i: abs(ends[i] - rows)) + 1 for rows in wanted}
    edges = sorted({0, *cuts, len(ends)})
    return tuple(pairwise(edges))


def _plan_admission(candidates: Sequence[Candidate], num_free_pages: int) -> tuple[Key, ...]:
    """Waiting sequences in order of arrival, until one does not fit: it is not overtaken for ever."""
    admit: list[Key] = []
    for candidate in candidates:
        if candidate.phase is Phase.WAITING:
            if candidate.num_pages > num_free_pages:
                break
            admit.append(candidate.key)
            num_free_pages -= candidate.num_pages
    return tuple(admit)
