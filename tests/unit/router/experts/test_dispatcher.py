"""The dispatcher between dispatches: tables, probes of quarantined workers, what is exported of peers."""

import numpy as np
import pytest

from router.experts.dispatcher import DispatchRules
from router.experts.peers import PeerRules
from tests.unit.router.experts.harness import HIDDEN, LAYER, plain_combine, random_choices
from tests.unit.router.experts.lab import Answer, Lab, Later, Script, lab, partial_of, twins, two_workers
from wire.errors import NotReady, WorkerLost
from wire.frames import FLAG_PREFILL, Frame, FrameKind

RULES = DispatchRules(deadline_s=10.0, peers=PeerRules(attempt_s=1.0, quarantine_s=0.5))
GAUGES = ("peer_row_seconds", "peer_queue_rows", "peer_straggler_score")


def test_first_table_is_waited_for() -> None:
    with lab(rules=RULES) as it:
        it.clock.after(3.0, lambda: it.dispatcher.set_table(two_workers(5)))
        it.dispatcher.adopt_table("decode")
        assert it.dispatcher.table_in_force().version == 5
    assert it.clock.now_s == 103.0
    assert it.metric("table_version") == 5


def test_no_table_within_the_deadline_is_not_ready() -> None:
    with lab(rules=RULES) as it:
        with pytest.raises(NotReady, match="no routing table yet"):
            it.dispatcher.adopt_table("decode")
        with pytest.raises(NotReady, match="no routing table yet"):
            it.dispatcher.table_in_force()
    assert it.clock.now_s == 110.0


def test_first_table_is_not_waited_for_by_who_has_given_up() -> None:
    with lab(rules=RULES) as it:
        it.clock.after(3.0, it.dispatcher.give_up)
        with pytest.raises(NotReady, match="no routing table yet"):
            it.dispatcher.adopt_table("decode")
    assert it.clock.now_s == 103.0


@pytest.mark.parametrize("answer", [None, WorkerLost("gone")])
def test_rows_are_not_waited_for_by_who_has_given_up(answer: WorkerLost | None) -> None:
    """Neither workers that are silent nor rows that are parked until one comes back."""
    with lab(lambda *_: answer, table=two_workers(1), rules=RULES) as it:
        it.clock.after(3.0, it.dispatcher.give_up)
        with pytest.raises(WorkerLost, match="gone" if answer else "is not waited for, the caller stops"):
            it.run(random_choices(4))
    assert it.clock.now_s == pytest.approx(103.0)


def test_table_does_not_change_within_a_step() -> None:
    with lab(table=two_workers(1)) as it:
        it.dispatcher.set_table(two_workers(2, split=1))
        it.run(random_choices(6))
        assert {frame.table_version for frame in it.frames} == {1}
        it.dispatcher.adopt_table("decode")
        it.run(random_choices(6))
    assert {frame.table_version for frame in it.frames[2:]} == {2}
    assert it.metric("table_version") == 2


def test_calls_say_the_phase_of_their_step() -> None:
    with lab(table=two_workers(1)) as it:
        it.adopt(two_workers(1), "prefill")
        it.run(random_choices(6))
        it.adopt(two_workers(1), "decode")
        it.run(random_choices(6))
    assert [frame.flags & FLAG_PREFILL for frame in it.frames] == [FLAG_PREFILL] * 2 + [0] * 2


def test_newer_table_wakes_who_waits_and_nothing_else_does() -> None:
    with lab(table=two_workers(1)) as it:
        it.dispatcher.changed.clear()
        it.dispatcher.adopt_table("decode")
        assert not it.dispatcher.changed.is_set()
        it.dispatcher.set_table(two_workers(2))
        assert it.dispatcher.changed.is_set()
        assert it.dispatcher.newest_table().version == 2
        assert it.dispatcher.table_in_force().version == 1


def test_loads_are_what_the_book_says_in_the_order_of_the_table() -> None:
    with lab(table=twins(names="ba")) as it:
        it.book.on_answer("a", num_rows=1, seconds=0.25, queue_rows=7)
        it.book.on_answer("b", num_rows=1, seconds=1.0, queue_rows=9)
        it.book.on_failure("a", now_s=0.0)
        loads = it.dispatcher.loads_of(it.dispatcher.table_in_force())
    assert loads.is_usable_W == [True, False]
    assert loads.backlog_W == [9, 7]
    assert loads.row_cost_W == [4, 1]


def test_calls_that_were_sent_are_counted_though_the_next_one_cannot_be() -> None:
    def script(number: int, worker_id: str, frame: Frame) -> Answer:
        if worker_id == "b":
            raise OSError("no memory for a block")
        return partial_of(frame)

    with lab(script, table=two_workers()) as it, pytest.raises(OSError, match="no memory"):
        it.run(random_choices(8))
    assert it.asked == ["a", "b"]
    assert it.metric("dispatch_rows_total") == len(it.frames[0].tensors[0])
    num_bytes = sum(tensor.nbytes for tensor in it.frames[0].tensors)
    assert it.metric("dispatch_bytes_total", direction="sent") == num_bytes


def test_nothing_is_counted_before_the_last_call_is_out() -> None:
    """What is counted while rows wait to be sent makes the workers wait."""
    counted: list[float | None] = []

    def script(number: int, worker_id: str, frame: Frame) -> Answer:
        counted.append(it.metric("dispatch_rows_total"))
        return partial_of(frame)

    with lab(script, table=two_workers()) as it:
        it.run(random_choices(8))
    assert counted == [0, 0]
    assert it.metric("dispatch_rows_total") == sum(len(frame.tensors[0]) for frame in it.frames)


def fails_then(answer: Answer | Later | None, *, first: int = 1) -> Script:
    """a's first calls of rows are lost; probes get `answer`; all else is answered honestly."""
    lost: list[int] = []

    def script(number: int, worker_id: str, frame: Frame) -> Answer | Later | None:
        if is_probe(frame):
            return answer
        if worker_id == "a" and len(lost) < first:
            lost.append(number)
            return WorkerLost("gone")
        return partial_of(frame)

    return script


def is_probe(frame: Frame) -> bool:
    return frame.tensors[0].shape[0] == 0


def probes(it: Lab) -> list[str]:
    return [worker for worker, frame in it.transport.sent if is_probe(frame)]


def probe_answer() -> Frame:
    return Frame(kind=FrameKind.PARTIAL, tensors=(np.zeros((0, HIDDEN)),))


def steps(it: Lab, seconds: float) -> None:
    """Steps without rows, every 10 ms."""
    for _ in range(round(seconds * 100)):
        it.clock.pass_s(0.01)
        it.dispatcher.adopt_table("decode")


def test_probe_is_a_call_of_no_rows_when_the_quarantine_is_over() -> None:
    with lab(fails_then(None), table=twins(8), rules=RULES) as it:
        it.run(random_choices(6))
        steps(it, 0.49)
        assert probes(it) == []
        steps(it, 0.02)
    assert probes(it) == ["a"]
    frame = it.frames[-1]
    assert (frame.kind, frame.layer_idx, frame.table_version, frame.flags) == (FrameKind.FORWARD, LAYER, 8, 0)
    assert [(t.dtype.name, t.shape) for t in frame.tensors] == [
        ("float32", (0, HIDDEN)), ("int32", (0,)), ("int32", (0,)), ("float32", (0,)),
    ]  # fmt: skip


def test_quarantined_worker_gets_no_rows_until_its_probe_is_answered() -> None:
    given_choices = random_choices(12)
    with lab(fails_then(Later(0.1, probe_answer())), table=twins(), rules=RULES) as it:
        it.run(given_choices)
        steps(it, 0.55)
        num_before = len(it.asked)
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
        assert it.asked[num_before:] == ["b"]
        assert it.metric("quarantined_workers") == 1
        steps(it, 0.1)
        assert it.metric("quarantined_workers") == 0
        assert np.array_equal(it.run(given_choices), plain_combine(given_choices))
    assert it.asked[num_before + 1 :] == ["a", "b"]
    assert probes(it) == ["a"]


@pytest.mark.parametrize(
    ("answer", "verdict_s"),
    [(None, 1.0), (WorkerLost("still gone"), 0.0), (Later(0.25, NotReady("loading")), 0.25)],
    ids=["silent", "lost at once", "refused later"],
)
def test_probe_that_fails_doubles_the_quarantine(answer: Answer | Later | None, verdict_s: float) -> None:
    """Probes 0.5 s after the failure, then 1, 2 and 4 s after each probe was found to have failed."""
    with lab(fails_then(answer), table=twins(), rules=RULES) as it:
        it.run(random_choices(6))
        sent_s = []
        for _ in range(1200):
            steps(it, 0.01)
            if len(probes(it)) > len(sent_s):
                sent_s.append(it.clock.now_s - 100)
    first, second, third, *_ = np.diff(sent_s)
    assert sent_s[0] == pytest.approx(0.5, abs=0.02)
    assert [first, second, third] == pytest.approx([verdict_s + t for t in (1.0, 2.0, 4.0)], abs=0.04)


def test_failure_after_a_probe_was_answered_is_one_more() -> None:
    """The worker answers probes, but loses rows: 0.5 s, 1 s, 2 s."""
    waits_s = []
    with lab(fails_then(probe_answer(), first=3), table=twins(), rules=RULES) as it:
        for _ in range(3):
            it.run(random_choices(12))
            failed_s, num_probes = it.clock.now_s, len(probes(it))
            while len(probes(it)) == num_probes:
                steps(it, 0.01)
            waits_s.append(it.clock.now_s - failed_s)
            steps(it, 0.01)
            assert it.book.trusted(["a"]) == [True]
    assert waits_s == pytest.approx([0.5, 1.0, 2.0], abs=0.02)


def test_probe_under_way_when_its_worker_leaves_is_forgotten() -> None:
    with lab(fails_then(Later(0.2, WorkerLost("old"))), table=twins(1), rules=RULES) as it:
        it.run(random_choices(6))
        steps(it, 0.55)
        assert probes(it) == ["a"]
        it.adopt(twins(2, names="b"))
        it.adopt(twins(3))
        steps(it, 1.0)
        assert it.book.trusted(["a", "b"]) == [True, True]
    assert probes(it) == ["a"]


def test_peers_are_exported_and_forgotten_when_they_leave() -> None:
    with lab(table=twins(1)) as it:
        it.book.on_answer("a", num_rows=10, seconds=0.5, queue_rows=3)
        it.book.on_answer("b", num_rows=10, seconds=0.1, queue_rows=0)
        it.dispatcher.adopt_table("decode")
        got = {w: [it.metric(name, worker=w) for name in GAUGES] for w in "ab"}
        assert got == {"a": pytest.approx([0.05, 3, 5]), "b": pytest.approx([0.01, 0, 1])}
        it.adopt(twins(2, names="bc"))
    assert [it.metric(name, worker="a") for name in GAUGES] == [None] * 3
    assert [it.metric(name, worker="b") for name in GAUGES] == pytest.approx([0.01, 0, 1])
    assert [it.metric(name, worker="c") for name in GAUGES] == [0, 0, 1]


def test_quarantined_worker_that_leaves_is_not_counted() -> None:
    with lab(table=twins(1)) as it:
        it.book.on_failure("a", now_s=it.clock.now_s)
        it.dispatcher.adopt_table("decode")
        assert it.metric("quarantined_workers") == 1
        it.adopt(twins(2, names="bc"))
    assert it.metric("quarantined_workers") == 0
