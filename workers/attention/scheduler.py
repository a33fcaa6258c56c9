"""The batch scheduler: which sequences run in the next step, and how many of their tokens. A pure decision.

Decoding sequences go first, one token each; prompt chunks fill what is left of the step's budget. The budget
is in cost, not in tokens (accounts.py), so that a step takes about as long wherever its chunks stand. Among
those who wait for the same thing, higher priority goes first, then the tenant for whom least was computed,
then who came first. A sequence gets all pages that it may ever need when it is admitted, so none is stopped
half-way for lack of them.
"""

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from workers.attention.accounts import token_cost
from workers.attention.types import Key, Phase


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the scheduler must know of a sequence, in order of arrival."""

    key: Key
    phase: Phase
    num_pending_tokens: int
    """Tokens to compute; >= 1 while in PREFILL or DECODE."""
    num_pages: int
    """Pages that it needs in all."""
    num_cached_tokens: int = 0
    """Tokens before those: what they look back at."""
    priority: int = 0
    """Higher goes first."""
    tenant: str = ""
    deadline_s: float = math.inf
    """When it is worth nothing any more, on the clock of `now_s`."""
    next_page: bytes | None = None
    """In PREFILL: hash of the page that its next tokens are in; two with the same one compute the same."""


@dataclass(frozen=True)
class StepLimits:
    """The bounds of one step."""

    max_batch_requests: int
    max_step_tokens: int
    micro_batches: int = 1
    """Parts of a step that take turns, at most."""
    context_cost_tokens: int = 1 << 16
    """Context at which a prompt token costs twice that of the first."""


@dataclass(frozen=True)
class Backlog:
    """What was done for whom, and how fast."""

    served: Mapping[str, float]
    """Tenant -> cost computed so far; every candidate's tenant is in it."""
    seconds_per_cost: float = 0.0
    """Of the fastest prompt; 0 = not known."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The decision."""

    fail: tuple[Key, ...] = ()
    """Waiting sequences that cannot have their first token before their deadline."""
    admit: tuple[Key, ...] = ()
    """Waiting sequences that get their pages now."""
    run: tuple[tuple[Key, int], ...] = ()
    """(sequence, tokens to compute) of this step."""


def plan_step(
    candidates: Sequence[Candidate],
    *,
    num_free_pages: int,
    now_s: float,
    backlog: Backlog,
    limits: StepLimits,
) -> StepPlan:
    """Who is admitted and who runs.

    Example: limits of 8 tokens; two sequences decode, a third has 100 prompt tokens left: the step runs
    1 + 1 + 6 tokens. Behind 65,536 cached tokens the third would get 3.

    Args:
        candidates: every sequence, oldest first.
        num_free_pages: pages that can be given away.
        now_s: the time.
        backlog: of the tenants, and the pace.
        limits: bounds of the step.
    """
    waiting = [c for c in candidates if c.phase is Phase.WAITING]
    fail = [c.key for c in waiting if _is_too_late(c, now_s=now_s, backlog=backlog, limits=limits)]
    hopeful = [c for c in waiting if c.key not in fail]
    admit = _plan_admission(order_fairly(hopeful, backlog.served), num_free_pages)
    max_decoding = min(limits.max_batch_requests, limits.max_step_tokens)
    decoding = [c for c in candidates if c.phase is Phase.DECODE]
    if len(decoding) > max_decoding:
        decoding = order_fairly(decoding, backlog.served)[:max_decoding]
    run = [(c.key, 1) for c in decoding]
    prefilling = order_fairly([c for c in candidates if c.phase is Phase.PREFILL], backlog.served)
    run += _plan_chunks(prefilling, limits.max_step_tokens - len(run), limits=limits)
    return StepPlan(fail=tuple(fail), admit=admit, run=tuple(run))


def order_fairly(candidates: Sequence[Candidate], served: Mapping[str, float]) -> list[Candidate]:
    """By priority; within one, always the next of the tenant who has least, counting what stands before it.

    Example: tenant a came first with two prompts of 10 tokens, tenant b with two of 4: a, b, b, a.
    """
    queues: dict[tuple[int, str], deque[Candidate]] = {}
    for candidate in candidates:
        queues.setdefault((-candidate.priority, candidate.tenant), deque()).append(candidate)
    if len(queues) <= 1:
        return list(candidates)
    first = {c.key: i for i, c in enumerate(candidates)}
    heap = [(rank, served[tenant], first[queue[0].key], tenant) for (rank, tenant), queue in queues.items()]
    heapq.heapify(heap)
    ordered = []
    while heap:
        rank, cost, _, tenant = heapq.heappop(heap)
        queue = queues[rank, tenant]
        candidate = queue.popleft()
        ordered.append(candidate)
        if queue:
            cost += candidate.num_pending_tokens
            heapq.heappush(heap, (rank, cost, first[queue[0].key], tenant))
    return ordered


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


def _is_too_late(candidate: Candidate, *, now_s: float, backlog: Backlog, limits: StepLimits) -> bool:
    """Whether even the fastest prompt so far would not have been there in time."""
    cost = token_cost(
        candidate.num_pending_tokens,
        first_position=candidate.num_cached_tokens,
        context_cost_tokens=limits.context_cost_tokens,
    )
    return now_s + cost * backlog.seconds_per_cost >= candidate.deadline_s


def _plan_admission(waiting: Sequence[Candidate], num_free_pages: int) -> tuple[Key, ...]:
    """The first in line until one does not fit: it is not overtaken for ever."""
    admit: list[Key] = []
    for candidate in waiting:
        if candidate.num_pages > num_free_pages:
            break
        admit.append(candidate.key)
        num_free_pages -= candidate.num_pages
    return tuple(admit)


def _plan_chunks(
    prefilling: Sequence[Candidate], budget: float, *, limits: StepLimits
) -> list[tuple[Key, int]]:
    """Chunks of prompts up to a cost; who would compute the same page as one before it waits for that."""
    run: list[tuple[Key, int]] = []
    begun: set[bytes] = set()
    for candidate in prefilling:
        if budget <= 0:
            break
        if candidate.next_page in begun:
            continue
        if candidate.next_page is not None:
            begun.add(candidate.next_page)
        cost = token_cost(
            1, first_position=candidate.num_cached_tokens, context_cost_tokens=limits.context_cost_tokens
        )
        num_tokens = min(candidate.num_pending_tokens, math.ceil(budget / cost))
        run.append((candidate.key, num_tokens))
        budget -= num_tokens * cost
    return run
