"""The batch scheduler: budgets, order, admission, and that there is always a next step."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.scheduler import (
    Backlog,
    Candidate,
    StepLimits,
    StepPlan,
    order_fairly,
    plan_step,
    split_step,
)
from workers.attention.types import Phase

LIMITS = st.builds(StepLimits, st.integers(1, 5), st.integers(1, 12))
TENANTS = "ab"


def candidate(name: int, phase: Phase, *, pending: int = 1, pages: int = 0, **fields: Any) -> Candidate:
    return Candidate(key=(str(name), 0), phase=phase, num_pending_tokens=pending, num_pages=pages, **fields)


@st.composite
def queues(draw: st.DrawFn, tenants: str = TENANTS, priorities: int = 1) -> list[Candidate]:
    phases = draw(st.lists(st.sampled_from(Phase), max_size=12))
    return [
        candidate(
            i,
            phase,
            pending=1 if phase is Phase.DECODE else draw(st.integers(1, 20)),
            pages=draw(st.integers(1, 6)) if phase is Phase.WAITING else 0,
            tenant=draw(st.sampled_from(tenants)),
            priority=draw(st.integers(0, priorities)),
        )
        for i, phase in enumerate(phases)
    ]


def _plan(queue: list[Candidate], limits: StepLimits, num_free_pages: int = 3, **served: float) -> StepPlan:
    backlog = Backlog({**dict.fromkeys([*TENANTS, ""], 0.0), **served})
    return plan_step(queue, num_free_pages=num_free_pages, now_s=0.0, backlog=backlog, limits=limits)


def _of(queue: list[Candidate], phase: Phase) -> list[Candidate]:
    return [c for c in queue if c.phase is phase]


@pytest.mark.parametrize(("num_cached_tokens", "num_tokens"), [(0, 6), (65536, 3)])
def test_docstring_example(num_cached_tokens: int, num_tokens: int) -> None:
    """8 tokens; two sequences decode, a third has 100 prompt tokens left: 1 + 1 + 6."""
    queue = [
        candidate(0, Phase.DECODE),
        candidate(1, Phase.PREFILL, pending=100, num_cached_tokens=num_cached_tokens),
        candidate(2, Phase.DECODE),
    ]
    plan = _plan(queue, StepLimits(64, 8))
    assert plan == StepPlan(run=((("0", 0), 1), (("2", 0), 1), (("1", 0), num_tokens)))


@given(queue=queues(), limits=LIMITS)
def test_step_keeps_its_bounds(queue: list[Candidate], limits: StepLimits) -> None:
    run = dict(_plan(queue, limits).run)
    assert len(run) == len(_plan(queue, limits).run)
    assert sum(run.values()) <= limits.max_step_tokens
    assert len([c for c in _of(queue, Phase.DECODE) if c.key in run]) <= limits.max_batch_requests
    by_key = {c.key: c for c in queue}
    assert all(1 <= tokens <= by_key[key].num_pending_tokens for key, tokens in run.items())
    assert {by_key[key].phase for key in run} <= {Phase.PREFILL, Phase.DECODE}


@given(
    firsts=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    max_step_tokens=st.integers(1, 40),
    context_cost_tokens=st.integers(1, 100),
)
def test_chunks_cost_no_more_than_a_step_of_tokens_without_context(
    firsts: list[int], max_step_tokens: int, context_cost_tokens: int
) -> None:
    """Up to the one token by which the last chunk may pass it; a step is never empty."""
    queue = [
        candidate(i, Phase.PREFILL, pending=50, num_cached_tokens=first) for i, first in enumerate(firsts)
    ]
    limits = StepLimits(8, max_step_tokens, context_cost_tokens=context_cost_tokens)
    run = _plan(queue, limits).run
    costs = [n * (1 + firsts[int(key[0])] / context_cost_tokens) for key, n in run]
    last_token = 1 + firsts[int(run[-1][0][0])] / context_cost_tokens
    assert sum(costs) < max_step_tokens + last_token


@given(queue=queues(tenants="a", priorities=0), limits=LIMITS)
def test_decoding_goes_first_and_the_oldest_before_the_younger(
    queue: list[Candidate], limits: StepLimits
) -> None:
    decoding, prefilling = _of(queue, Phase.DECODE), _of(queue, Phase.PREFILL)
    num_decoding = min(len(decoding), limits.max_batch_requests, limits.max_step_tokens)
    left = limits.max_step_tokens - num_decoding
    expected = [(c.key, 1) for c in decoding[:num_decoding]]
    for c in prefilling:
        if left > 0:
            expected.append((c.key, min(left, c.num_pending_tokens)))
            left -= expected[-1][1]
    assert list(_plan(queue, limits).run) == expected


@given(queue=queues(priorities=0), limits=LIMITS, num_free_pages=st.integers(0, 12))
def test_nobody_in_line_is_overtaken(queue: list[Candidate], limits: StepLimits, num_free_pages: int) -> None:
    """The admitted are the longest run of the first in line that fits."""
    line = order_fairly(_of(queue, Phase.WAITING), dict.fromkeys(TENANTS, 0.0))
    admit = _plan(queue, limits, num_free_pages).admit
    assert admit == tuple(c.key for c in line[: len(admit)])
    used = sum(c.num_pages for c in line[: len(admit)])
    num_slots = limits.max_batch_requests - (len(queue) - len(line))
    assert used <= num_free_pages
    assert len(admit) <= max(num_slots, 0)
    if len(admit) < min(len(line), num_slots):
        assert used + line[len(admit)].num_pages > num_free_pages


def test_order_of_the_docstring() -> None:
    queue = [
        candidate(i, Phase.WAITING, pending=tokens, tenant=tenant)
        for i, (tenant, tokens) in enumerate([("a", 10), ("a", 10), ("b", 4), ("b", 4)])
    ]
    assert [c.tenant for c in order_fairly(queue, {"a": 0, "b": 0})] == ["a", "b", "b", "a"]


@given(queue=queues(), served=st.dictionaries(st.sampled_from(TENANTS), st.integers(0, 50)))
def test_order_is_by_priority_then_by_share_then_by_age(
    queue: list[Candidate], served: dict[str, float]
) -> None:
    """Each next is of the highest priority left, of its least served tenant, and that one's oldest."""
    served = {**dict.fromkeys(TENANTS, 0.0), **served}
    left, priority, counted = list(queue), None, dict(served)
    for c in order_fairly(queue, served):
        if c.priority != priority:
            priority, counted = c.priority, dict(served)
        rivals = [other for other in left if other.priority == priority]
        assert c.priority == max(other.priority for other in left)
        assert counted[c.tenant] == min(counted[other.tenant] for other in rivals)
        assert c == next(other for other in rivals if other.tenant == c.tenant)
        left.remove(c)
        counted[c.tenant] += c.num_pending_tokens
    assert not left


def test_tenants_get_equal_shares_whoever_asks_for_more() -> None:
    """a has ten prompts, b one of the same length as all of them: after 40 steps both had half."""
    queue = [candidate(i, Phase.PREFILL, pending=40, tenant="a") for i in range(10)]
    queue.append(candidate(10, Phase.PREFILL, pending=400, tenant="b"))
    served: Counter[str] = Counter(a=0, b=0)
    for _ in range(40):
        for key, num_tokens in _plan(queue, StepLimits(8, 10), **served).run:
            c = queue[int(key[0])]
            queue[int(key[0])] = replace(c, num_pending_tokens=c.num_pending_tokens - num_tokens)
            served[c.tenant] += num_tokens
        queue = [c if c.num_pending_tokens else replace(c, phase=Phase.RECEIVING) for c in queue]
    assert served == {"a": 200, "b": 200}


def test_same_page_is_computed_once_in_a_step() -> None:
    """0 and 1 begin the same page, 2 another, 3 none that could be shared."""
    pages = [b"x", b"x", b"y", None]
    queue = [candidate(i, Phase.PREFILL, pending=3, next_page=page) for i, page in enumerate(pages)]
    assert [key[0] for key, _ in _plan(queue, StepLimits(8, 64)).run] == ["0", "2", "3"]


@pytest.mark.parametrize(
    ("deadline_s", "seconds_per_cost", "phase", "fails"),
    [
        (10.0, 1.0, Phase.WAITING, True),
        (10.1, 1.0, Phase.WAITING, False),
        (10.0, 0.0, Phase.WAITING, False),
        (0.0, 0.0, Phase.WAITING, True),
        (0.0, 1.0, Phase.PREFILL, False),
        (0.0, 1.0, Phase.DECODE, False),
        (math.inf, 1.0, Phase.WAITING, False),
    ],
)
def test_who_waits_in_vain_is_told_at_once(
    deadline_s: float, seconds_per_cost: float, phase: Phase, fails: bool
) -> None:
    """A prompt of 10 tokens at 1 s each is there after 10 s at the earliest."""
    queue = [candidate(0, phase, pending=10, deadline_s=deadline_s)]
    backlog = Backlog({"": 0.0}, seconds_per_cost)
    plan = plan_step(queue, num_free_pages=3, now_s=0.0, backlog=backlog, limits=StepLimits(8, 64))
    assert plan.fail == ((("0", 0),) if fails else ())
    assert not set(plan.fail) & set(plan.admit)


@given(queue=queues(), limits=LIMITS)
def test_there_is_a_step_exactly_when_something_can_run(queue: list[Candidate], limits: StepLimits) -> None:
    can_run = bool(_of(queue, Phase.PREFILL) or _of(queue, Phase.DECODE))
    plan = _plan(queue, limits)
    assert bool(plan.run) == can_run or plan.preempt is not None


@given(queue=queues(), limits=LIMITS)
def test_queue_empties_whatever_it_holds(queue: list[Candidate], limits: StepLimits) -> None:
    """Carried out with pages for the largest alone; a computed prompt decodes one token and leaves."""
    queue = [replace(c, phase=Phase.WAITING, num_pages=1 + i % 6, priority=0) for i, c in enumerate(queue)]
    num_pages = max((c.num_pages for c in queue), default=0)
    for _ in range(1000):
        if not queue:
            break
        held = sum(c.num_held_pages for c in queue)
        plan = _plan(queue, limits, num_pages - held)
        assert plan.admit or plan.run
        queue = [_carried_out(c, plan) for c in queue]
        queue = [c for c in queue if c.num_pending_tokens]
    assert not queue


def _carried_out(c: Candidate, plan: StepPlan) -> Candidate:
    if c.key in plan.admit:
        return replace(c, phase=Phase.PREFILL, num_pages=0, num_held_pages=c.num_pages)
    pending = c.num_pending_tokens - dict(plan.run).get(c.key, 0)
    if c.phase is Phase.PREFILL and pending == 0:
        return replace(c, phase=Phase.DECODE, num_pending_tokens=1)
    return replace(c, num_pending_tokens=pending)


@pytest.mark.parametrize("phase", [Phase.RECEIVING, Phase.WAITING])
def test_nothing_to_do_is_an_empty_plan(phase: Phase) -> None:
    plan = _plan([candidate(0, phase, pages=4)], StepLimits(1, 1))
    assert plan == StepPlan()
    assert plan.is_idle


def _full(name: int, **fields: Any) -> Candidate:
    """One that cannot go on without another page."""
    return candidate(name, Phase.DECODE, pages=1, is_full=True, num_held_pages=2, **fields)


@pytest.mark.parametrize(
    ("holders", "victim"),
    [
        ([_full(0), candidate(1, Phase.DECODE), candidate(2, Phase.DECODE)], 2),
        ([_full(0), candidate(1, Phase.DECODE), candidate(2, Phase.RECEIVING)], 1),
        ([_full(0), candidate(1, Phase.RECEIVING)], 1),
        ([_full(0), candidate(1, Phase.PREFILL), candidate(2, Phase.PREFILL, is_for_others=True)], 1),
        ([_full(0), candidate(1, Phase.DECODE, priority=-1), candidate(2, Phase.DECODE)], 1),
        ([candidate(0, Phase.DECODE, priority=-1), _full(1)], 0),
        ([candidate(0, Phase.DECODE), _full(1), candidate(2, Phase.DECODE, priority=1)], None),
        ([_full(0), candidate(1, Phase.PREFILL, is_for_others=True)], None),
    ],
)
def test_pages_are_taken_from_the_youngest_of_the_lowest_priority(
    holders: list[Candidate], victim: int | None
) -> None:
    """Never from those before it; then it stands still and the others run."""
    plan = _plan(holders, StepLimits(8, 64), num_free_pages=0)
    assert plan.preempt == (None if victim is None else (str(victim), 0))
    if victim is None:
        stalled = [c.key for c in holders if c.is_full]
        assert [key for key, _ in plan.run] == [c.key for c in holders if c.key not in stalled]
    else:
        assert not plan.run


def test_page_for_a_draft_is_not_worth_a_preemption() -> None:
    holders = [candidate(0, Phase.DECODE, pages=1), candidate(1, Phase.DECODE)]
    assert _plan(holders, StepLimits(8, 64), num_free_pages=0).preempt is None
    assert _plan(holders, StepLimits(8, 64), num_free_pages=1).grow == ((("0", 0), 1),)


@pytest.mark.parametrize(
    ("priority", "num_held_pages", "preempt"),
    [(1, 3, ("1", 0)), (1, 2, None), (0, 3, None), (-1, 3, None)],
)
def test_higher_priority_takes_pages_if_that_is_enough(
    priority: int, num_held_pages: int, preempt: tuple[str, int] | None
) -> None:
    """It wants 8 pages, 2 are free, two others have 3 each or 2 each."""
    holders = [candidate(i, Phase.DECODE, num_held_pages=num_held_pages) for i in range(2)]
    waiting = candidate(2, Phase.WAITING, pages=8, priority=priority)
    assert _plan([*holders, waiting], StepLimits(8, 64), num_free_pages=2).preempt == preempt


def test_one_page_stays_free_for_each_that_may_grow() -> None:
    """With 5 free, one that wants 3 gets in beside two that may grow, and not beside three."""
    waiting = candidate(9, Phase.WAITING, pages=3)
    for num_growing, admit in [(2, (waiting.key,)), (3, ())]:
        growing = [candidate(i, Phase.DECODE, may_grow=True) for i in range(num_growing)]
        assert _plan([*growing, waiting], StepLimits(8, 64), num_free_pages=5).admit == admit


@pytest.mark.parametrize(("patience_s", "refuse"), [(0.0, (("0", 0),)), (0.1, ())])
def test_who_has_waited_enough_is_refused(patience_s: float, refuse: tuple[object, ...]) -> None:
    assert _plan([candidate(0, Phase.WAITING, patience_s=patience_s)], StepLimits(8, 64)).refuse == refuse


def test_prefill_for_others_gets_in_where_all_wait_for_rows() -> None:
    """Before it stands one that is too large; the pages belong to one whose rows are under way."""
    receiving = candidate(0, Phase.RECEIVING, num_held_pages=4)
    large = candidate(1, Phase.WAITING, pages=4)
    wanted = candidate(2, Phase.WAITING, pages=2, is_for_others=True)
    queue = [receiving, large, wanted]
    assert _plan(queue, StepLimits(8, 64), num_free_pages=2).admit == (wanted.key,)
    assert _plan(queue, StepLimits(8, 64), num_free_pages=1).preempt == receiving.key
    assert _plan([receiving, large], StepLimits(8, 64), num_free_pages=2).is_idle


def test_split_of_the_docstring() -> None:
    assert split_step([1, 1, 6, 1], micro_batches=2) == ((0, 2), (2, 4))


@given(num_rows=st.lists(st.integers(1, 40), max_size=12), micro_batches=st.integers(1, 4))
def test_parts_cover_the_step_in_order(num_rows: list[int], micro_batches: int) -> None:
    parts = split_step(num_rows, micro_batches=micro_batches)
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(len(num_rows)))
    assert all(begin < end for begin, end in parts)
    assert len(parts) <= micro_batches


@given(num_rows=st.lists(st.integers(1, 40), min_size=2, max_size=12))
def test_halves_differ_by_no_more_than_the_sequence_between_them(num_rows: list[int]) -> None:
    halves = [sum(num_rows[begin:end]) for begin, end in split_step(num_rows, micro_batches=2)]
    assert max(halves) - min(halves + [0] * (2 - len(halves))) <= max(num_rows)
