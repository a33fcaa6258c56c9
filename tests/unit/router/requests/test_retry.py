"""What a session does after a failure."""

import pytest

from router.requests.retry import GiveUp, Replay, RetryState, plan_retry
from router.requests.selection import Route
from router.requests.types import Failure
from wire.errors import (
    DeadlinePassed,
    ExpertNotLoaded,
    FrameInvalid,
    HandshakeRefused,
    InternalError,
    InvalidRequest,
    ModelBroken,
    NotReady,
    Overloaded,
    RequestCancelled,
    StaleTable,
    WorkerLost,
)

STATE = RetryState(num_replays_left=3, patience_s=30.0, progress_s=100.0)


def failure(kind=WorkerLost, *, is_answer=False, made_progress=False):
    return Failure(error=kind("why"), is_answer=is_answer, made_progress=made_progress)


@pytest.fixture
def pair(make):
    """Two workers of both roles, and the route over the first."""
    one, two = make.worker("a"), make.worker("b")
    return make.view(one, two), Route(decode=one, prefill=one)


@pytest.fixture
def single(make):
    """One worker of both roles, and the route over it."""
    one = make.worker("a")
    return make.view(one), Route(decode=one, prefill=one)


@pytest.fixture
def split(make):
    """Two prefill and two decode workers, and the route over the first of each."""
    prefill, decode = make.worker("p1", "prefill"), make.worker("d1", "decode")
    view = make.view(prefill, make.worker("p2", "prefill"), decode, make.worker("d2", "decode"))
    return view, Route(decode=decode, prefill=prefill)


def plan(place, state, what, now_s=101.0):
    view, route = place
    return plan_retry(state, what, route=route, view=view, now_s=now_s)


@pytest.mark.parametrize("kind", [WorkerLost, FrameInvalid, NotReady, Overloaded, RequestCancelled])
def test_lost_worker_is_avoided_and_another_tried_at_once(pair, kind):
    state, action = plan(pair, STATE, failure(kind))
    assert action == Replay(delay_s=0.0)
    assert state.avoid == ("a#1",)
    assert state.num_replays_left == 2


@pytest.mark.parametrize("kind", [StaleTable, ExpertNotLoaded])
def test_table_that_lags_is_nobodys_fault_and_waits_a_moment(pair, kind):
    state, action = plan(pair, STATE, failure(kind, is_answer=True))
    assert action.delay_s > 0
    assert state.avoid == ()
    assert state.num_replays_left == 2


@pytest.mark.parametrize(
    "kind", [InvalidRequest, HandshakeRefused, ModelBroken, InternalError, DeadlinePassed]
)
def test_error_that_no_replay_mends_is_told(pair, kind):
    what = failure(kind, is_answer=True)
    state, action = plan(pair, STATE, what)
    assert action == GiveUp(error=what.error)
    assert state == STATE


def test_call_dropped_by_the_worker_is_told_as_a_lost_worker(pair):
    _, action = plan(
        pair, RetryState(num_replays_left=0, patience_s=30, progress_s=100), failure(RequestCancelled)
    )
    assert isinstance(action.error, WorkerLost)


def test_status_that_no_worker_gave_is_a_lost_worker(pair):
    assert plan(pair, STATE, failure(InternalError))[1] == Replay(delay_s=0.0)


@pytest.mark.parametrize(
    ("kind", "is_answer", "made_progress", "blamed"),
    [
        (WorkerLost, True, False, "p1#1"),
        (FrameInvalid, True, False, "p1#1"),
        (WorkerLost, True, True, "d1#1"),
        (WorkerLost, False, False, "d1#1"),
        (NotReady, True, False, "d1#1"),
        (Overloaded, True, False, "d1#1"),
    ],
)
def test_blame_goes_to_the_worker_at_fault(split, kind, is_answer, made_progress, blamed):
    state, _ = plan(split, STATE, failure(kind, is_answer=is_answer, made_progress=made_progress))
    assert state.avoid == (blamed,)


def test_replays_run_out(pair):
    what = failure(made_progress=True)
    state = STATE
    for _ in range(3):
        state, action = plan(pair, state, what)
        assert isinstance(action, Replay)
    assert plan(pair, state, what)[1] == GiveUp(error=what.error)


def test_no_replays_means_the_first_error_is_told(pair):
    state = RetryState(num_replays_left=0, patience_s=30.0, progress_s=100.0)
    assert isinstance(plan(pair, state, failure())[1], GiveUp)


def test_waiting_for_the_only_worker_spends_time_and_not_replays(single):
    state, action = plan(single, STATE, failure(made_progress=True))
    assert (action, state.num_replays_left) == (Replay(delay_s=0.05), 2)
    delays = []
    for _ in range(7):
        state, action = plan(single, state, failure())
        delays.append(action.delay_s)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert state.num_replays_left == 2


def test_patience_counts_from_the_last_progress_and_ends(single):
    state, _ = plan(single, STATE, failure(made_progress=True), now_s=200.0)
    assert isinstance(plan(single, state, failure(), now_s=229.9)[1], Replay)
    assert isinstance(plan(single, state, failure(), now_s=230.0)[1], GiveUp)


def test_progress_starts_the_waits_afresh(single):
    state, _ = plan(single, STATE, failure(), now_s=101)
    state, _ = plan(single, state, failure(), now_s=102)
    state, action = plan(single, state, failure(made_progress=True), now_s=110)
    assert action == Replay(delay_s=0.05)
    assert state.progress_s == 110


def test_worker_started_again_is_another_worker(make, single):
    state, _ = plan(single, STATE, failure())
    reborn = make.worker("a", incarnation=2)
    place = make.view(reborn), Route(decode=reborn, prefill=reborn)
    _, action = plan(place, state, failure(StaleTable))
    assert isinstance(action, Replay)


def full(retry_after_s=0.0, *, field=""):
    return Failure(
        error=Overloaded("full", field=field, retry_after_s=retry_after_s),
        is_answer=True,
        made_progress=False,
    )


@pytest.mark.parametrize(
    ("first_s", "second_s", "told_s"), [(0.0, 0.0, 0.0), (2.0, 5.0, 2.0), (5.0, 2.0, 2.0), (0.0, 3.0, 3.0)]
)
def test_overload_everywhere_is_told_with_the_shortest_delay(pair, first_s, second_s, told_s):
    state, action = plan(pair, STATE, full(first_s))
    assert action == Replay(delay_s=0.0)
    view, _ = pair
    second = Route(decode=view.workers[1], prefill=view.workers[1])
    _, action = plan((view, second), state, full(second_s))
    assert isinstance(action.error, Overloaded)
    assert action.error.retry_after_s == told_s


def test_full_workers_use_no_replays_up(make):
    workers = [make.worker(name) for name in "abcdef"]
    view, state = make.view(*workers), STATE
    for worker in workers[:5]:
        state, action = plan((view, Route(decode=worker, prefill=worker)), state, full())
        assert action == Replay(delay_s=0.0)
    assert state.num_replays_left == 3
    last = Route(decode=workers[5], prefill=workers[5])
    assert isinstance(plan((view, last), state, full())[1], GiveUp)


def test_full_prefill_worker_is_not_taken_for_a_full_decode_worker(split):
    state, action = plan(split, STATE, full(field="prefill_address"))
    assert (action, state.avoid) == (Replay(delay_s=0.0), ("p1#1",))
    state, _ = plan(split, STATE, full())
    assert state.avoid == ("d1#1",)


def test_overload_after_tokens_is_waited_out(single):
    state, _ = plan(single, STATE, failure(made_progress=True))
    _, action = plan(single, state, failure(Overloaded, is_answer=True))
    assert isinstance(action, Replay)
    assert action.delay_s > 0
