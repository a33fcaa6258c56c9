"""The dispatcher over a transport whose futures the test holds: combine, retry, refuse, give up, count."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import router.experts.dispatcher
from router.experts.dispatcher import ExpertDispatcher, PendingDispatch
from router.experts.plan import WorkerCall
from router.experts.table import RoutingTable, build_table
from tests.unit.router.experts.harness import (
    HIDDEN,
    LAYER,
    Choices,
    choices,
    copies,
    partial_sums,
    plain_combine,
    random_choices,
    tables,
)
from wire.errors import (
    ExpertNotLoaded,
    FrameInvalid,
    HandshakeRefused,
    ModelBroken,
    MorayError,
    NotReady,
    StaleTable,
    WorkerLost,
)
from wire.frames import Frame, FrameKind
from wire.metrics import Metrics

Script = Callable[[int, str, Frame], Frame | MorayError | None]
"""(number of the call, worker, frame) -> what comes back; None = never."""


def partial_of(frame: Frame) -> Frame:
    """What an honest expert worker answers."""
    x_RD, row_idx_A, expert_idx_A, weight_A = frame.tensors
    call = WorkerCall("", np.arange(len(x_RD)), row_idx_A, expert_idx_A, weight_A)
    return replace(frame, kind=FrameKind.PARTIAL, tensors=(partial_sums(x_RD, call),))


def honest(number: int, worker_id: str, frame: Frame) -> Frame:
    return partial_of(frame)


class FakeTransport:
    """Answers by a script and keeps what was sent."""

    def __init__(self, script: Script = honest) -> None:
        self.script = script
        self.sent: list[tuple[str, Frame]] = []

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        self.sent.append((worker_id, frame))
        future: Future[Frame] = Future()
        answer = self.script(len(self.sent) - 1, worker_id, frame)
        if isinstance(answer, MorayError):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(answer)
        return future

    def close(self) -> None:
        pass


class Lab:
    """A dispatcher with a table in force."""

    def __init__(
        self, script: Script = honest, *, table: RoutingTable | None = None, deadline_s: float = 30.0
    ) -> None:
        self.transport = FakeTransport(script)
        self.metrics = Metrics("attention")
        self.dispatcher = ExpertDispatcher(self.transport, deadline_s=deadline_s, metrics=self.metrics)
        self.dispatcher.set_table(table or two_workers(1))
        self.dispatcher.adopt_table()

    def start(self, given_choices: Choices) -> PendingDispatch:
        return self.dispatcher.start(
            LAYER, given_choices.x_TD, given_choices.ids_TK, given_choices.weights_TK
        )

    def run(self, given_choices: Choices) -> np.ndarray:
        return self.start(given_choices).result()

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"moray_attention_dispatch_{name}", labels) or 0.0


def two_workers(version: int, *, split: int = 3) -> RoutingTable:
    """Six experts: those below `split` on worker a, the others on worker b."""
    replicas = [replica for e in range(6) for replica in copies(e, [int(e >= split)], [1])]
    return build_table(version=version, num_experts=6, worker_ids=["a", "b"], layers={LAYER: replicas})


@pytest.fixture(autouse=True)
def short_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a newer table that does not come."""
    monkeypatch.setattr(router.experts.dispatcher, "_RETRY_S", 0.001)


@given(given_choices=choices(), table=tables(num_experts=6, version=3))
def test_result_equals_the_plain_loop(given_choices: Choices, table: RoutingTable) -> None:
    got = Lab(table=table).run(given_choices)
    assert got.dtype == np.float32
    assert np.array_equal(got, plain_combine(given_choices))


def test_calls_are_sent_before_anyone_waits_and_carry_layer_and_version() -> None:
    lab = Lab(table=two_workers(7))
    lab.start(random_choices(8))
    assert [worker for worker, _ in lab.transport.sent] == ["a", "b"]
    frames = [frame for _, frame in lab.transport.sent]
    assert {(f.kind, f.layer_idx, f.table_version) for f in frames} == {(FrameKind.FORWARD, LAYER, 7)}
    assert [t.dtype.name for t in frames[0].tensors] == ["float32", "int32", "int32", "float32"]


def test_no_rows_need_no_call() -> None:
    lab = Lab()
    assert lab.run(random_choices(0)).shape == (0, HIDDEN)
    assert lab.transport.sent == []


@given(
    given_choices=choices(),
    first=tables(num_experts=6, version=1),
    second=tables(num_experts=6, version=2),
    lost=st.integers(0, 15),
    error=st.sampled_from([WorkerLost, ExpertNotLoaded, StaleTable, NotReady]),
)
def test_lost_calls_go_to_the_newer_table_and_change_no_bit(
    given_choices: Choices, first: RoutingTable, second: RoutingTable, lost: int, error: type[MorayError]
) -> None:
    lab = Lab(table=first)

    def script(number: int, worker_id: str, frame: Frame) -> Frame | MorayError:
        if frame.table_version == 1 and lost >> number & 1:
            lab.dispatcher.set_table(second)
            return error("gone")
        return partial_of(frame)

    lab.transport.script = script
    assert np.array_equal(lab.run(given_choices), plain_combine(given_choices))
    versions = [frame.table_version for _, frame in lab.transport.sent]
    num_first = versions.count(1)
    num_lost = sum(lost >> i & 1 for i in range(num_first))
    assert lab.metric("retries_total", reason=error.__name__) == num_lost
    assert versions == sorted(versions)
    assert (2 in versions) == (num_lost > 0)


def test_only_what_was_lost_is_sent_again() -> None:
    lab = Lab()
    given_choices = random_choices(9)

    def script(number: int, worker_id: str, frame: Frame) -> Frame | MorayError:
        return WorkerLost("gone") if number == 1 else partial_of(frame)

    lab.transport.script = script
    lab.run(given_choices)
    assert [worker for worker, _ in lab.transport.sent] == ["a", "b", "b"]
    _, lost, again = (frame for _, frame in lab.transport.sent)
    assert [np.array_equal(x, y) for x, y in zip(lost.tensors, again.tensors, strict=True)] == [True] * 4


def test_lost_call_is_tried_on_the_same_table_when_no_newer_comes() -> None:
    given_choices = random_choices(5)
    lab = Lab(lambda number, _worker, frame: WorkerLost("gone") if number < 9 else partial_of(frame))
    assert np.array_equal(lab.run(given_choices), plain_combine(given_choices))
    assert {frame.table_version for _, frame in lab.transport.sent} == {1}


def test_lost_call_waits_for_a_newer_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer table comes only once the dispatcher waits; nothing is sent before it."""
    monkeypatch.setattr(router.experts.dispatcher, "_RETRY_S", 30.0)
    is_waiting = threading.Event()

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            is_waiting.set()
            return super().wait(timeout)

    lab = Lab(lambda *args: partial_of(args[2]) if args[2].table_version == 2 else WorkerLost("gone"))
    lab.dispatcher._changed = Condition()

    def publish() -> None:
        if is_waiting.wait(10):
            lab.dispatcher.set_table(two_workers(2))

    publishing = threading.Thread(target=publish)
    publishing.start()
    given_choices = random_choices(5)
    assert np.array_equal(lab.run(given_choices), plain_combine(given_choices))
    publishing.join(timeout=30)
    assert [frame.table_version for _, frame in lab.transport.sent] == [1, 1, 2, 2]


@pytest.mark.parametrize("error", [HandshakeRefused("other model"), ModelBroken("x"), FrameInvalid("y")])
def test_error_that_a_retry_does_not_mend_is_raised_at_once(error: MorayError) -> None:
    lab = Lab(lambda *_: error)
    with pytest.raises(type(error), match=error.message):
        lab.run(random_choices(4))
    assert len(lab.transport.sent) == 2
    assert lab.metric("retries_total", reason=type(error).__name__) == 0


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda f: replace(f, table_version=2), "answered for table 2 layer 3, wanted table 1 layer 3"),
        (lambda f: replace(f, layer_idx=4), "answered for table 1 layer 4, wanted table 1 layer 3"),
        (lambda f: replace(f, kind=FrameKind.SCORES), "answered SCORES"),
        (lambda f: replace(f, tensors=()), r"answered PARTIAL \[\], wanted \[\('float64'"),
        (lambda f: replace(f, tensors=f.tensors * 2), "answered PARTIAL"),
        (lambda f: replace(f, tensors=(f.tensors[0].astype(np.float32),)), r"float32.*wanted \[\('float64'"),
        (lambda f: replace(f, tensors=(f.tensors[0][:-1],)), r"wanted \[\('float64'"),
        (lambda f: replace(f, tensors=(f.tensors[0][:, :-1],)), r"wanted \[\('float64'"),
        (lambda f: replace(f, tensors=(f.tensors[0][:1],)), r"wanted \[\('float64'"),
    ],
)
def test_reply_that_does_not_fit_is_refused(wrong: Callable[[Frame], Frame], what: str) -> None:
    lab = Lab(lambda _number, _worker, frame: wrong(partial_of(frame)))
    with pytest.raises(FrameInvalid, match=what):
        lab.run(random_choices(6))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda f: replace(f, table_version=2), "version"),
        (lambda f: replace(f, tensors=()), "shape"),
        (lambda f: replace(f, tensors=(f.tensors[0] * np.nan,)), "nonfinite"),
    ],
)
def test_refused_reply_is_counted_by_reason(wrong: Callable[[Frame], Frame], reason: str) -> None:
    lab = Lab(lambda _number, _worker, frame: wrong(partial_of(frame)))
    with pytest.raises(FrameInvalid, match=r"^a answered"):
        lab.run(random_choices(6))
    assert lab.metric("refused_total", reason=reason) == 1


def test_silence_until_the_deadline_is_a_lost_worker() -> None:
    lab = Lab(lambda *_: None, deadline_s=0.01)
    with pytest.raises(WorkerLost, match=r"layer 3: no answer within dispatch.deadline_s=0\.01 s"):
        lab.run(random_choices(4))


@pytest.mark.parametrize("error", [WorkerLost, ExpertNotLoaded])
def test_retries_end_at_the_deadline_with_the_last_error(error: type[MorayError]) -> None:
    lab = Lab(lambda *_: error("still gone"), deadline_s=0.02)
    with pytest.raises(error, match="still gone"):
        lab.run(random_choices(4))
    assert lab.metric("retries_total", reason=error.__name__) >= 2


def test_first_table_is_waited_for() -> None:
    dispatcher = ExpertDispatcher(FakeTransport(), deadline_s=30, metrics=Metrics("attention"))
    waiting = threading.Thread(target=dispatcher.adopt_table)
    waiting.start()
    dispatcher.set_table(two_workers(5))
    waiting.join(timeout=30)
    assert dispatcher.table_in_force().version == 5
    assert dispatcher.metrics.registry.get_sample_value("moray_attention_table_version") == 5


def test_no_table_within_the_deadline_is_not_ready() -> None:
    dispatcher = ExpertDispatcher(FakeTransport(), deadline_s=0.01, metrics=Metrics("attention"))
    with pytest.raises(NotReady, match="no routing table yet"):
        dispatcher.adopt_table()
    with pytest.raises(NotReady, match="no routing table yet"):
        dispatcher.table_in_force()


def test_table_does_not_change_within_a_step() -> None:
    lab = Lab()
    lab.dispatcher.set_table(two_workers(2, split=1))
    lab.run(random_choices(6))
    assert {frame.table_version for _, frame in lab.transport.sent} == {1}
    lab.dispatcher.adopt_table()
    lab.run(random_choices(6))
    assert {frame.table_version for _, frame in lab.transport.sent[2:]} == {2}


def test_rows_bytes_and_time_are_counted() -> None:
    lab = Lab()
    given_choices = random_choices(6)
    lab.run(given_choices)
    frames = [frame for _, frame in lab.transport.sent]
    num_rows = sum(frame.tensors[0].shape[0] for frame in frames)
    assert lab.metric("rows_total") == num_rows
    assert (
        lab.metric("bytes_total", direction="sent") == num_rows * HIDDEN * 4 + len(given_choices.pairs()) * 12
    )
    assert lab.metric("bytes_total", direction="received") == num_rows * HIDDEN * 8
    assert lab.metric("seconds_count") == 1
