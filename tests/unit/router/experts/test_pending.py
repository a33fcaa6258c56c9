"""One dispatch over workers that a test holds: combine, rescue, refuse, give up, count; no row twice."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experts.dispatcher import DispatchRules
from router.experts.peers import PeerRules
from router.experts.table import RoutingTable
from tests.unit.router.experts.harness import (
    HIDDEN,
    LAYER,
    Choices,
    choices,
    plain_combine,
    random_choices,
    tables,
)
from tests.unit.router.experts.lab import (
    Answer,
    Lab,
    Later,
    honest,
    lab,
    partial_of,
    placed,
    twins,
    two_workers,
)
from wire.errors import (
    ExpertNotLoaded,
    FrameInvalid,
    HandshakeRefused,
    InternalError,
    ModelBroken,
    MorayError,
    NotReady,
    StaleTable,
    WorkerLost,
)
from wire.frames import FLAG_LOAD_MISSING, Frame, FrameKind

PATIENT = DispatchRules(deadline_s=1e6)
"""No storm that a test makes lasts so long."""
HASTY = DispatchRules(deadline_s=10.0, peers=PeerRules(attempt_s=1.0))
NONSENSE: tuple[tuple[Callable[[Frame], Frame], str, str], ...] = (
    (
        lambda f: replace(f, table_version=2),
        "version",
        "answered for table 2 layer 3, wanted table 1 layer 3",
    ),
    (lambda f: replace(f, layer_idx=4), "version", "answered for table 1 layer 4, wanted table 1 layer 3"),
    (lambda f: replace(f, kind=FrameKind.SCORES), "shape", "answered SCORES"),
    (lambda f: replace(f, tensors=()), "shape", r"answered PARTIAL \[\], wanted \[\('float64'"),
    (lambda f: replace(f, tensors=f.tensors * 2), "shape", "answered PARTIAL"),
    (lambda f: replace(f, tensors=(f.tensors[0].astype(np.float32),)), "shape", r"float32.*wanted"),
    (lambda f: replace(f, tensors=(f.tensors[0][:-1],)), "shape", r"wanted \[\('float64'"),
    (lambda f: replace(f, tensors=(f.tensors[0][:, :-1],)), "shape", r"wanted \[\('float64'"),
    (lambda f: replace(f, tensors=(f.tensors[0][:1],)), "shape", r"wanted \[\('float64'"),
    (lambda f: replace(f, tensors=(f.tensors[0] * np.nan,)), "nonfinite", "NaN or infinite"),
)


@given(given_choices=choices(), table=tables(num_experts=6, version=3))
def test_result_equals_the_plain_loop(given_choices: Choices, table: RoutingTable) -> None:
    with lab(table=table) as it:
        got = it.run(given_choices)
    assert got.dtype == np.float32
    assert np.array_equal(got, plain_combine(given_choices))


def test_calls_are_sent_before_anyone_waits_and_carry_layer_and_version() -> None:
    with lab(lambda *_: None, table=two_workers(7)) as it:
        it.start(random_choices(8))
    assert it.asked == ["a", "b"]
    assert {(f.kind, f.layer_idx, f.table_version, f.flags) for f in it.frames} == {
        (FrameKind.FORWARD, LAYER, 7, 0)
    }
    assert [t.dtype.name for t in it.frames[0].tensors] == ["float32", "int32", "int32", "float32"]


def test_no_rows_need_no_call() -> None:
    with lab(table=two_workers()) as it:
        assert it.run(random_choices(0)).shape == (0, HIDDEN)
    assert it.asked == []


@dataclass(frozen=True)
class Fate:
    """What becomes of a call, and when."""

    what: str
    delay_s: float

    def of(self, frame: Frame) -> Answer | Later | None:
        errors = {"lost": WorkerLost, "stale": StaleTable, "not ready": NotReady, "missing": ExpertNotLoaded}
        if self.what == "silent":
            return None
        if self.what == "nonsense":
            return Later(self.delay_s, replace(frame, kind=FrameKind.SCORES))
        if self.what == "honest":
            return Later(self.delay_s, partial_of(frame))
        return Later(self.delay_s, errors[self.what](self.what))


@dataclass(frozen=True)
class Storm:
    """The fates of the first calls, whoever gets them; those behind are answered at once."""

    fates: tuple[Fate, ...]
    table_after_s: float
    """When a newer table comes."""

    def script(self, number: int, worker_id: str, frame: Frame) -> Answer | Later | None:
        return self.fates[number].of(frame) if number < len(self.fates) else partial_of(frame)


@st.composite
def storms(draw: st.DrawFn) -> Storm:
    """At most two answers are nonsense: the third ends a dispatch."""
    kinds = st.sampled_from(["honest", "lost", "stale", "not ready", "missing", "silent", "nonsense"])
    delays = st.one_of(st.just(0.0), st.floats(0.0, 8.0))
    fates = draw(st.lists(st.builds(Fate, kinds, delays), max_size=14))
    nonsense = [i for i, fate in enumerate(fates) if fate.what == "nonsense"]
    for i in nonsense[2:]:
        fates[i] = Fate("silent", 0.0)
    return Storm(tuple(fates), draw(st.floats(0.0, 5.0)))


@given(
    given_choices=choices(),
    storm=storms(),
    first=tables(num_experts=6, version=1),
    second=tables(num_experts=6, version=2),
)
def test_no_storm_changes_a_bit(
    given_choices: Choices, storm: Storm, first: RoutingTable, second: RoutingTable
) -> None:
    """Lost, late, refused and repeated calls in any order: each row is added exactly once."""
    with lab(storm.script, table=first, rules=PATIENT) as it:
        it.clock.after(storm.table_after_s, lambda: it.dispatcher.set_table(second))
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))


@pytest.mark.parametrize("error", [WorkerLost, StaleTable, NotReady])
def test_rows_of_a_lost_call_go_to_the_other_copies(error: type[MorayError]) -> None:
    given_choices = random_choices(9)
    with lab(lambda n, _, frame: error("gone") if n == 0 else partial_of(frame), table=twins()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "b"]
    lost, _, again = it.frames
    assert [np.array_equal(x, y) for x, y in zip(lost.tensors, again.tensors, strict=True)] == [True] * 4
    assert again.flags == 0
    assert it.clock.now_s == 100.0
    assert it.metric("dispatch_retries_total", reason=error.__name__) == 1
    assert it.book.trusted(["a", "b"]) == [False, True]


def test_worker_that_does_not_hold_the_experts_stands_in_and_may_load_them() -> None:
    given_choices = random_choices(9)
    with lab(lambda n, _, f: WorkerLost("gone") if n == 0 else partial_of(f), table=two_workers()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "b"]
    assert [frame.flags for frame in it.frames] == [0, 0, FLAG_LOAD_MISSING]


def test_rescue_is_spread_over_the_copies_that_are_left() -> None:
    """Experts 0 to 2 live on a and b, 3 to 5 on a and c."""
    given_choices = random_choices(40)
    table = placed(1, [[0, 1]] * 3 + [[0, 2]] * 3, names="abc")
    with lab(lambda _, worker, f: WorkerLost("gone") if worker == "a" else partial_of(f), table=table) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "c", "b", "c"]
    assert [set(frame.tensors[2].tolist()) for frame in it.frames[3:]] == [{0, 1, 2}, {3, 4, 5}]
    assert [frame.flags for frame in it.frames] == [0] * 5


def late_worker(delay_s: float, *, rescue_s: float) -> Callable[..., Later]:
    """A script: the first call takes `delay_s`, calls sent once it is late take `rescue_s`, others none."""

    def script(number: int, worker_id: str, frame: Frame) -> Later:
        return Later((delay_s, 0.0, rescue_s)[min(number, 2)], partial_of(frame))

    return script


@pytest.mark.parametrize(
    ("delay_s", "rescue_s", "ends_s", "num_sent"),
    [(0.9, 9.0, 0.9, 2), (1.5, 9.0, 1.5, 3), (9.0, 0.25, 1.25, 3)],
    ids=["in time", "late answer first", "rescue first"],
)
def test_late_call_is_rescued_and_the_first_answer_wins(
    delay_s: float, rescue_s: float, ends_s: float, num_sent: int
) -> None:
    given_choices = random_choices(9)
    with lab(late_worker(delay_s, rescue_s=rescue_s), table=twins(), rules=HASTY) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.clock.now_s == pytest.approx(100.0 + ends_s)
    assert it.asked == ["a", "b", "b"][:num_sent]
    assert (it.metric("dispatch_retries_total", reason="late") or 0) == num_sent - 2
    assert it.book.trusted(["a"]) == [num_sent == 2]


def test_late_answer_still_counts_when_its_rescue_is_lost() -> None:
    """The rescue is lost at 101.5 s; what is sent then would be answered at 111 s."""

    def script(number: int, worker_id: str, frame: Frame) -> Later:
        if number == 2:
            return Later(0.5, WorkerLost("gone too"))
        return late_worker(5.0, rescue_s=9.0)(number, worker_id, frame)

    given_choices = random_choices(9)
    with lab(script, table=twins(), rules=HASTY) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.clock.now_s == pytest.approx(105.0)


def test_late_call_that_is_lost_after_all_is_not_sent_a_second_time() -> None:
    """It is late after 1 s and lost after 1.5 s; its rescue takes 3 s."""

    def script(number: int, worker_id: str, frame: Frame) -> Later:
        return (
            Later(1.5, WorkerLost("gone"))
            if number == 0
            else late_worker(0.0, rescue_s=3.0)(number, "", frame)
        )

    given_choices = random_choices(9)
    with lab(script, table=twins(names="abc"), rules=HASTY) as it:
        it.book.on_answer("b", num_rows=1, seconds=1.0, queue_rows=0)
        it.book.on_answer("c", num_rows=1, seconds=1.0, queue_rows=0)
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked[:3] == ["a", "b", "c"]
    rescued = np.concatenate([frame.tensors[2] for frame in it.frames[3:]])
    assert sorted(rescued.tolist()) == sorted(it.frames[0].tensors[2].tolist())


def test_every_further_attempt_may_take_twice_as_long() -> None:
    sent_s = []

    def silent(number: int, worker_id: str, frame: Frame) -> None:
        sent_s.append(it.clock.now_s - 100)

    with (
        lab(silent, table=twins(names="abcdef"), rules=DispatchRules(deadline_s=20.0)) as it,
        pytest.raises(WorkerLost),
    ):
        it.run(random_choices(1, top_k=1))
    # Attempts of 1, 2, 4 and 8 s; the fifth, begun at 15 s, is cut off by the deadline.
    assert sent_s == pytest.approx([0.0, 1.0, 3.0, 7.0, 15.0])
    assert len(set(it.asked)) == 5


def test_worker_known_to_be_slow_gets_the_time_it_needs() -> None:
    """8 x 1 s a row: a call of one row is late after 8 s."""
    with lab(lambda _n, _w, f: Later(7.5, partial_of(f)), table=twins(names="a")) as it:
        it.book.on_answer("a", num_rows=1, seconds=1.0, queue_rows=0)
        it.run(random_choices(1, top_k=1))
    assert it.asked == ["a"]


@pytest.mark.parametrize(("wrong", "reason"), [case[:2] for case in NONSENSE])
def test_nonsense_is_counted_and_its_rows_are_computed_elsewhere(
    wrong: Callable[[Frame], Frame], reason: str
) -> None:
    given_choices = random_choices(9)
    with lab(lambda _, w, f: wrong(partial_of(f)) if w == "a" else partial_of(f), table=twins()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "b"]
    assert it.metric("dispatch_refused_total", reason=reason) == 1
    assert it.metric("dispatch_retries_total", reason="FrameInvalid") == 1
    assert it.book.trusted(["a", "b"]) == [False, True]


@pytest.mark.parametrize(("wrong", "reason", "what"), NONSENSE)
def test_third_nonsense_ends_the_dispatch(wrong: Callable[[Frame], Frame], reason: str, what: str) -> None:
    with (
        lab(lambda _n, _w, f: wrong(partial_of(f)), table=twins(names="abcd")) as it,
        pytest.raises(FrameInvalid, match=rf"^[a-d] .*{what}") as caught,
    ):
        it.run(random_choices(6))
    assert caught.value.field == reason
    assert it.metric("dispatch_refused_total", reason=reason) == 3


def test_worker_whose_slots_differ_is_asked_to_load() -> None:
    given_choices = random_choices(9)
    with lab(lambda n, _, f: ExpertNotLoaded("no") if n == 0 else partial_of(f), table=twins()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "a"]
    assert [frame.flags for frame in it.frames] == [0, 0, FLAG_LOAD_MISSING]
    assert it.metric("dispatch_retries_total", reason="ExpertNotLoaded") == 1
    assert it.book.trusted(["a", "b"]) == [True, True]


def test_worker_that_cannot_load_either_is_a_failure() -> None:
    given_choices = random_choices(9)
    with lab(lambda _, w, f: ExpertNotLoaded("no") if w == "a" else partial_of(f), table=twins()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b", "a", "b"]
    assert [frame.flags for frame in it.frames] == [0, 0, FLAG_LOAD_MISSING, 0]
    assert it.metric("dispatch_retries_total", reason="ExpertNotLoaded") == 2
    assert it.book.trusted(["a", "b"]) == [False, True]


@pytest.mark.parametrize("error", [HandshakeRefused("other model"), ModelBroken("x"), InternalError("y")])
def test_error_that_no_other_worker_mends_is_raised_at_once(error: MorayError) -> None:
    with lab(lambda *_: error, table=twins()) as it, pytest.raises(type(error), match=error.message):
        it.run(random_choices(4))
    assert it.asked == ["a", "b"]
    assert it.metric("dispatch_retries_total", reason=type(error).__name__) is None
    assert it.book.num_quarantined() == 0


@pytest.mark.parametrize("table", [two_workers(), twins()])
def test_silence_until_the_deadline_is_a_lost_worker(table: RoutingTable) -> None:
    with (
        lab(lambda *_: None, table=table, rules=HASTY) as it,
        pytest.raises(WorkerLost, match=r"layer 3: no answer of [ab] .* dispatch.deadline_s=10 s"),
    ):
        it.run(random_choices(4))
    assert it.clock.now_s == pytest.approx(110.0)


@pytest.mark.parametrize("error", [WorkerLost, ExpertNotLoaded])
def test_retries_end_at_the_deadline_with_the_last_error(error: type[MorayError]) -> None:
    with (
        lab(lambda *_: error("still gone"), table=two_workers(), rules=HASTY) as it,
        pytest.raises(error, match="still gone"),
    ):
        it.run(random_choices(4))
    assert it.clock.now_s == pytest.approx(110.0)
    # Waits of 0.2, 0.4, 0.8, 1.6 and then 2 s, and a worker without the expert is asked twice: not a storm.
    assert 6 <= len(it.asked) <= 32


def only_version(version: int) -> Callable[[int, str, Frame], Answer]:
    return lambda _n, _w, frame: partial_of(frame) if frame.table_version == version else WorkerLost("gone")


def test_newer_table_is_waited_for_when_nobody_is_trusted() -> None:
    given_choices = random_choices(5)
    with lab(only_version(2), table=twins()) as it:
        it.clock.after(0.15, lambda: it.dispatcher.set_table(twins(2, names="cd")))
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.clock.now_s == pytest.approx(100.15)
    assert it.asked[:3] == ["a", "b", "b"]
    assert set(it.asked[3:]) == {"c", "d"}


def test_everyone_is_tried_again_when_no_newer_table_comes() -> None:
    given_choices = random_choices(5)
    with lab(lambda n, _, f: WorkerLost("gone") if n < 3 else partial_of(f), table=twins()) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    # a's rows go to b, b's fail too: 0.4 s for a newer table, then both are asked for what is left.
    assert it.asked[:3] == ["a", "b", "b"]
    assert set(it.asked[3:]) == {"a", "b"}
    assert {frame.table_version for frame in it.frames} == {1}
    assert 100.2 <= it.clock.now_s < 101.0


def test_dispatch_that_begins_with_nobody_trusted_asks_everyone() -> None:
    given_choices = random_choices(5)
    with lab(table=two_workers()) as it:
        for worker_id in ("a", "b"):
            it.book.on_failure(worker_id, now_s=it.clock.now_s)
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked == ["a", "b"]
    assert [frame.flags for frame in it.frames] == [0, 0]


def test_retried_rows_use_the_newest_table_and_the_step_keeps_its_own() -> None:
    def script(number: int, worker_id: str, frame: Frame) -> Answer:
        if number == 0:
            it.dispatcher.set_table(two_workers(2, split=0))
            return WorkerLost("gone")
        return partial_of(frame)

    with lab(script, table=two_workers()) as it:
        it.run(random_choices(6))
        it.run(random_choices(6))
        assert it.dispatcher.table_in_force().version == 1
    assert [frame.table_version for frame in it.frames[:3]] == [1, 1, 2]
    assert {frame.table_version for frame in it.frames[3:]} == {1}


def test_answers_teach_the_book_speed_and_queue() -> None:
    def script(number: int, worker_id: str, frame: Frame) -> Later:
        return Later(0.5, replace(partial_of(frame), queue_rows=17))

    given_choices = random_choices(4, top_k=1)
    with lab(script, table=placed(1, [[0]] * 6, names="a")) as it:
        it.run(given_choices)
    num_rows = len(it.frames[0].tensors[0])
    assert it.book.seconds_per_row("a") == pytest.approx(0.5 / num_rows)
    assert it.book.queue_rows("a") == 17


def test_speed_is_until_the_answer_came_not_until_it_was_looked_at() -> None:
    """Workers are looked at in turn, and perhaps late: a slow one must not make those behind it look slow."""
    seconds = {"a": 0.8, "b": 0.1}
    with lab(lambda _n, worker, f: Later(seconds[worker], partial_of(f)), table=two_workers()) as it:
        pending = it.start(random_choices(8))
        it.clock.pass_s(2.0)
        pending.result()
    for (worker, frame), expected_s in zip(it.transport.sent, (0.8, 0.1), strict=True):
        assert it.book.seconds_per_row(worker) * len(frame.tensors[0]) == pytest.approx(expected_s)


def counted(it: Lab, name: str, **labels: str) -> float:
    return it.metric(f"dispatch_{name}", **labels) or 0.0


@pytest.mark.parametrize("script", [honest, lambda n, _, f: WorkerLost("x") if n == 0 else partial_of(f)])
def test_rows_bytes_and_time_are_counted(script: Callable[..., Answer]) -> None:
    """What is sent again counts again."""
    given_choices = random_choices(6)
    with lab(script, table=two_workers()) as it:
        it.run(given_choices)
    num_rows = sum(frame.tensors[0].shape[0] for frame in it.frames)
    num_pairs = sum(frame.tensors[1].size for frame in it.frames)
    num_lost = it.frames[0].tensors[0].shape[0] if len(it.frames) > 2 else 0
    assert counted(it, "rows_total") == num_rows
    assert counted(it, "bytes_total", direction="sent") == num_rows * HIDDEN * 4 + num_pairs * 12
    assert counted(it, "bytes_total", direction="received") == (num_rows - num_lost) * HIDDEN * 8
    assert counted(it, "seconds_count") == 1
    assert it.metric("combine_seconds_count") == 1


def test_time_of_a_dispatch_is_from_plan_to_combine() -> None:
    with lab(lambda _n, _w, f: Later(0.25, partial_of(f)), table=two_workers()) as it:
        pending = it.start(random_choices(6))
        it.clock.pass_s(0.5)
        pending.result()
    assert counted(it, "seconds_sum") == pytest.approx(0.5)
    assert it.metric("combine_seconds_sum") == 0.0


def test_late_answer_counts_while_nobody_is_trusted() -> None:
    """Call 0 is answered after 5 s; every call sent from 1 s on is lost 0.5 s later; the deadline is 10 s."""

    def script(number: int, worker_id: str, frame: Frame) -> Answer | Later | None:
        if number > 1:
            return Later(0.5, WorkerLost("gone too"))
        return Later((5.0, 0.0)[number], partial_of(frame))

    given_choices = random_choices(9)
    with lab(script, table=twins(), rules=HASTY) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
        assert it.clock.now_s < 107.0


def test_lost_call_is_rescued_while_a_slow_one_before_it_is_waited_for() -> None:
    sent_s: list[float] = []

    def script(number: int, worker_id: str, frame: Frame) -> Answer | Later | None:
        sent_s.append(it.clock.now_s)
        if number == 0:
            return Later(0.9, partial_of(frame))
        return Later(0.1, WorkerLost("gone")) if number == 1 else partial_of(frame)

    given_choices = random_choices(9)
    with lab(script, table=twins(), rules=HASTY) as it:
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
        assert it.clock.now_s == pytest.approx(100.9)
    assert sent_s[2] == pytest.approx(100.1)


def test_answer_is_let_go_of_with_its_dispatch_and_not_by_a_later_collection() -> None:
    answers = []

    def later(number: int, worker_id: str, frame: Frame) -> Later:
        answer = partial_of(frame)
        answers.append(weakref.ref(answer.tensors[0]))
        return Later(0.1, answer)

    with lab(later, table=two_workers()) as it:
        gc.disable()
        try:
            it.run(random_choices(9))
            assert [answer() for answer in answers] == [None, None]
        finally:
            gc.enable()
