"""The batch scheduler: budgets, order, admission, and that there is always a next step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.scheduler import Candidate, StepLimits, StepPlan, plan_step, split_step
from workers.attention.types import Phase

LIMITS = st.builds(StepLimits, st.integers(1, 5), st.integers(1, 12))


def candidate(name: int, phase: Phase, *, pending: int = 1, pages: int = 1) -> Candidate:
    return Candidate((str(name), 0), phase, num_pending_tokens=pending, num_pages=pages)


@st.composite
def queues(draw: st.DrawFn) -> list[Candidate]:
    phases = draw(st.lists(st.sampled_from(Phase), max_size=12))
    return [
        candidate(
            i,
            phase,
            pending=1 if phase is Phase.DECODE else draw(st.integers(1, 20)),
            pages=draw(st.integers(1, 6)),
        )
        for i, phase in enumerate(phases)
    ]


def _plan(queue: list[Candidate], limits: StepLimits, num_free_pages: int = 3) -> StepPlan:
    return plan_step(queue, num_free_pages=num_free_pages, limits=limits)


def _of(queue: list[Candidate], phase: Phase) -> list[Candidate]:
    return [c for c in queue if c.phase is phase]


def test_docstring_example() -> None:
    """8 tokens; two sequences decode, a third has 100 prompt tokens left: 1 + 1 + 6."""
    queue = [
        candidate(0, Phase.DECODE), candidate(1, Phase.PREFILL, pending=100), candidate(2, Phase.DECODE),
    ]  # fmt: skip
    plan = _plan(queue, StepLimits(64, 8))
    assert plan == StepPlan(admit=(), run=((("0", 0), 1), (("2", 0), 1), (("1", 0), 6)))


@given(queue=queues(), limits=LIMITS)
def test_step_keeps_its_bounds(queue: list[Candidate], limits: StepLimits) -> None:
    run = dict(_plan(queue, limits).run)
    assert len(run) == len(_plan(queue, limits).run)
    assert sum(run.values()) <= limits.max_step_tokens
    assert len([c for c in _of(queue, Phase.DECODE) if c.key in run]) <= limits.max_batch_requests
    by_key = {c.key: c for c in queue}
    assert all(1 <= tokens <= by_key[key].num_pending_tokens for key, tokens in run.items())
    assert {by_key[key].phase for key in run} <= {Phase.PREFILL, Phase.DECODE}


@given(queue=queues(), limits=LIMITS)
def test_decoding_goes_first_and_the_oldest_before_the_younger(
    queue: list[Candidate], limits: StepLimits
) -> None:
    decoding, prefilling = _of(queue, Phase.DECODE), _of(queue, Phase.PREFILL)
    num_decoding = min(len(decoding), limits.max_batch_requests, limits.max_step_tokens)
    left = limits.max_step_tokens - num_decoding
    expected = [(c.key, 1) for c in decoding[:num_decoding]]
    for c in prefilling:
        if left:
            expected.append((c.key, min(left, c.num_pending_tokens)))
            left -= expected[-1][1]
    assert list(_plan(queue, limits).run) == expected


@given(queue=queues(), limits=LIMITS, num_free_pages=st.integers(0, 12))
def test_admission_is_first_come_first_served(
    queue: list[Candidate], limits: StepLimits, num_free_pages: int
) -> None:
    """The admitted are the longest run of the oldest waiting that fits: nobody is overtaken."""
    waiting = _of(queue, Phase.WAITING)
    admit = _plan(queue, limits, num_free_pages).admit
    assert admit == tuple(c.key for c in waiting[: len(admit)])
    used = sum(c.num_pages for c in waiting[: len(admit)])
    assert used <= num_free_pages
    if len(admit) < len(waiting):
        assert used + waiting[len(admit)].num_pages > num_free_pages


@given(queue=queues(), limits=LIMITS)
def test_there_is_a_step_exactly_when_something_can_run(queue: list[Candidate], limits: StepLimits) -> None:
    can_run = bool(_of(queue, Phase.PREFILL) or _of(queue, Phase.DECODE))
    assert bool(_plan(queue, limits).run) == can_run


@given(queue=queues(), limits=LIMITS)
def test_queue_empties_whatever_it_holds(queue: list[Candidate], limits: StepLimits) -> None:
    """Carried out with pages for the largest alone; a computed prompt decodes one token and leaves."""
    queue = [replace(c, phase=Phase.WAITING) for c in queue]
    num_pages = max((c.num_pages for c in queue), default=0)
    order = []
    for _ in range(1000):
        if not queue:
            break
        held = sum(c.num_pages for c in queue if c.phase is not Phase.WAITING)
        plan = _plan(queue, limits, num_pages - held)
        assert plan.admit or plan.run
        order += plan.admit
        queue = [_carried_out(c, plan) for c in queue]
        queue = [c for c in queue if c.num_pending_tokens]
    assert not queue
    assert order == sorted(order, key=lambda key: int(key[0]))


def _carried_out(c: Candidate, plan: StepPlan) -> Candidate:
    if c.key in plan.admit:
        return replace(c, phase=Phase.PREFILL)
    pending = c.num_pending_tokens - dict(plan.run).get(c.key, 0)
    if c.phase is Phase.PREFILL and pending == 0:
        return replace(c, phase=Phase.DECODE, num_pending_tokens=1)
    return replace(c, num_pending_tokens=pending)


@pytest.mark.parametrize("phase", [Phase.RECEIVING, Phase.WAITING])
def test_nothing_to_do_is_an_empty_plan(phase: Phase) -> None:
    assert _plan([candidate(0, phase, pages=4)], StepLimits(1, 1)) == StepPlan(admit=(), run=())


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
