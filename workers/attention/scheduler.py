"""The batch scheduler: who gets pages, who gives them up, and who runs in the next step. A pure decision.

Decoding sequences go first, one token each; prompt chunks fill what is left of the step's budget. The budget
is in cost, not in tokens (accounts.py), so that a step takes about as long wherever its chunks stand. Among
those who wait for the same thing, higher priority goes first, then the tenant for whom least was computed,
then who came first.

A sequence is admitted with pages for its prompt and a bit more, and gets others as it grows. When none is
left, the youngest sequence of the lowest priority gives its pages up and is computed again later; the text
is the same. Nothing waits for ever: of those that hold pages the oldest of the highest priority always gets
the next one.
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
    """Pages that it wants now: to be admitted, or to go on."""
    num_held_pages: int = 0
    """Pages that it has; some may be others' too."""
    is_full: bool = False
    """In DECODE: without those pages it cannot run."""
    may_grow: bool = False
    """It may want more before it ends."""
    is_for_others: bool = False
    """A prefill for another worker: never preempted, since it ends without help."""
    num_cached_tokens: int = 0
    """Tokens before those: what they look back at."""
    priority: int = 0
    """Higher goes first."""
    tenant: str = ""
    deadline_s: float = math.inf
    """When it is worth nothing any more, on the clock of `now_s`."""
    patience_s: float = math.inf
    """While it waits: when it is refused, on the same clock."""
    next_page: bytes | None = None
    """In PREFILL: hash of the page that its next tokens are in; two with the same one compute the same."""


@dataclass(frozen=True)
class StepLimits:
    """The bounds of one step."""

    max_batch_requests: int
    """Sequences that hold pages, beside prefills for other workers; more wait in line."""
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
    refuse: tuple[Key, ...] = ()
    """Waiting sequences whose patience is over."""
    preempt: Key | None = None
    """A sequence that gives its pages up; then nothing else is done before the next plan."""
    grow: tuple[tuple[Key, int], ...] = ()
    """(sequence, pages) of those that get more."""
    admit: tuple[Key, ...] = ()
    """Waiting sequences that get their pages now."""
    run: tuple[tuple[Key, int], ...] = ()
    """(sequence, tokens to compute) of this step."""

    @property
    def is_idle(self) -> bool:
        """Whether it changes nothing: only an event from outside can."""
        return self == StepPlan()


def plan_step(
    candidates: Sequence[Candidate],
    *,
    num_free_pages: int,
    now_s: float,
    backlog: Backlog,
    limits: StepLimits,
) -> StepPlan:
    """Who gets pages and who runs.

    Example: limits of 8 tokens; two sequences decode, a third has 100 prompt tokens left: the step runs
    1 + 1 + 6 tokens. Behind 65,536 cached tokens the third would get 3.

    Args:
        candidates: every sequence, oldest first.
        num_free_pages: pages that can be given away.
        now_s: the time.
        backlog: of the tenants, and the pace.
        limits: bounds of the step.
    """
    line = order_fairly([c for c in candidates if c.phase is Phase.WAITING], backlog.served)
    fail = tuple(c.key for c in line if _is_too_late(c, now_s=now_s, backlog=backlog, limits=limits))
    refuse = tuple(c.key for c in line if now_s >= c.patience_s and c.key not in fail)
    line = [c for c in line if c.key not in fail and c.key not in refuse]
    # A stable sort: of one priority the oldest first.
    holders = sorted((c for c in candidates if c.phase is not Phase.WAITING), key=lambda c: -c.priority)
    pages = _plan_pages(line, holders, num_free_pages, num_slots=limits.max_batch_requests)
    if pages.preempt is None:
        run = _plan_run(candidates, pages.stalled, backlog=backlog, limits=limits)
        if not run and not pages.admit:
            pages = _plan_way_out(line, holders, num_free_pages)
        if pages.preempt is None:
            return StepPlan(fail=fail, refuse=refuse, grow=pages.grow, admit=pages.admit, run=run)
    return StepPlan(fail=fail, refuse=refuse, preempt=pages.preempt)


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


@dataclass(frozen=True, kw_only=True)
class _PagePlan:
    """Where pages go; with `preempt`, what is said beside it is void."""

    grow: tuple[tuple[Key, int], ...] = ()
    stalled: frozenset[Key] = frozenset()
    """Sequences that cannot run for lack of a page, and may not take one from those before them."""
    admit: tuple[Key, ...] = ()
    preempt: Key | None = None


def _plan_pages(
    line: Sequence[Candidate], holders: Sequence[Candidate], num_free_pages: int, *, num_slots: int
) -> _PagePlan:
    """Pages for those who have some, in order of their rank, then for the first in line."""
    grow: list[tuple[Key, int]] = []
    stalled: set[Key] = set()
    for rank, holder in enumerate(holders):
        if holder.phase is not Phase.DECODE or not holder.num_pages:
            continue
        if holder.num_pages <= num_free_pages:
            grow.append((holder.key, holder.num_pages))
            num_free_pages -= holder.num_pages
        elif holder.is_full:
            victim = _find_victim(holders[rank + 1 :])
            if victim is not None:
                return _PagePlan(preempt=victim)
            stalled.add(holder.key)
    admit, victim = _plan_admission(line, holders, num_free_pages, num_slots=num_slots)
    return _PagePlan(grow=tuple(grow), stalled=frozenset(stalled), admit=admit, preempt=victim)


def _plan_admission(
    line: Sequence[Candidate], holders: Sequence[Candidate], num_free_pages: int, *, num_slots: int
) -> tuple[tuple[Key, ...], Key | None]:
    """The first in line until one does not fit: it is not overtaken for ever. And who must make room for it.

    A page for each sequence that may grow stays free, or who is let in would be sent away again at once.
    """
    admit: list[Key] = []
    num_free_pages -= sum(holder.may_grow for holder in holders)
    num_slots -= sum(not holder.is_for_others for holder in holders)
    for candidate in line:
        has_slot = candidate.is_for_others or num_slots > 0
        if candidate.num_pages > num_free_pages or not has_slot:
            lower = [h for h in holders if h.priority < candidate.priority and not h.is_for_others]
            num_lower_pages = sum(h.num_held_pages for h in lower)
            makes_room = not admit and candidate.num_pages <= num_free_pages + num_lower_pages
            return tuple(admit), _find_victim(lower) if makes_room else None
        admit.append(candidate.key)
        num_free_pages -= candidate.num_pages + candidate.may_grow
        num_slots -= not candidate.is_for_others
    return tuple(admit), None


def _plan_way_out(line: Sequence[Candidate], holders: Sequence[Candidate], num_free_pages: int) -> _PagePlan:
    """What to do when nothing can run: two workers must not wait for each other's prefills for ever.

    The first prefill for another worker gets in, past those before it, and past sequences that wait for rows
    of others: they are computed here later.
    """
    first = next((c for c in line if c.is_for_others), None)
    if first is None:
        return _PagePlan()
    if first.num_pages <= num_free_pages:
        return _PagePlan(admit=(first.key,))
    return _PagePlan(preempt=_find_victim(holders))


def _find_victim(holders: Sequence[Candidate]) -> Key | None:
    """Who gives its pages up: the last, and one whose rows are under way only if there is no other."""
    own = [h.key for h in holders if h.phase is not Phase.RECEIVING and not h.is_for_others]
    receiving = [h.key for h in holders if h.phase is Phase.RECEIVING]
    return (receiving + own)[-1] if receiving or own else None


def _plan_run(
    candidates: Sequence[Candidate], stalled: frozenset[Key], *, backlog: Backlog, limits: StepLimits
) -> tuple[tuple[Key, int], ...]:
    """One token for those who decode, and chunks of prompts for what is left of the budget."""
    decoding = [c for c in candidates if c.phase is Phase.DECODE and c.key not in stalled]
    max_decoding = min(limits.max_batch_requests, limits.max_step_tokens)
    if len(decoding) > max_decoding:
        decoding = order_fairly(decoding, backlog.served)[:max_decoding]
    run = [(c.key, 1) for c in decoding]
    prefilling = order_fairly([c for c in candidates if c.phase is Phase.PREFILL], backlog.served)
    run += _plan_chunks(prefilling, limits.max_step_tokens - len(run), limits=limits)
    return tuple(run)


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
