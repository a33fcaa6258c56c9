"""The queue before the arithmetic: who computes, what is computed together, what the answers say."""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from wire.frames import Frame, FrameKind
from wire.metrics import Metrics
from workers.expert.call_queue import CallQueue

WAIT_S = 20


def call(call_id: int, *, layer_idx: int = 1, rows: int = 2) -> Frame:
    x_RD = np.zeros((rows, 4), np.float32)
    return Frame(kind=FrameKind.FORWARD, tensors=(x_RD,), call_id=call_id, layer_idx=layer_idx)


class Lab:
    """A queue whose computation can be held up."""

    def __init__(self) -> None:
        self.metrics = Metrics("expert")
        self.batches: list[list[int]] = []
        self.computed_by: list[str] = []
        self.starts: list[str] = []
        self.announced: list[str] = []
        self.answers: dict[int, Frame] = {}
        self.is_computing = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._answered = threading.Condition()
        self.queue = CallQueue(
            self.answer_all,
            start=lambda: self.starts.append(threading.current_thread().name),
            metrics=self.metrics,
            on_thread=lambda: self.announced.append(threading.current_thread().name),
        )

    def answer_all(self, frames: Sequence[Frame], reply: Callable[[int, Frame], None]) -> None:
        self.batches.append([frame.call_id for frame in frames])
        self.computed_by.append(threading.current_thread().name)
        self.is_computing.set()
        assert self.may_go_on.wait(WAIT_S)
        for idx, frame in enumerate(frames):
            reply(idx, Frame(kind=FrameKind.PARTIAL, call_id=frame.call_id))

    def submit(self, frame: Frame, *, may_compute: bool) -> None:
        self.queue.submit(frame, self.reply, may_compute=may_compute)

    def reply(self, answer: Frame) -> None:
        with self._answered:
            self.answers[answer.call_id] = answer
            self._answered.notify_all()

    def wait_answers(self, number: int) -> None:
        with self._answered:
            assert self._answered.wait_for(lambda: len(self.answers) == number, WAIT_S)

    def hold(self, *calls: Frame) -> None:
        """Lets the first call be computed for as long as the others come in."""
        self.may_go_on.clear()
        self.submit(calls[0], may_compute=False)
        assert self.is_computing.wait(WAIT_S)
        for each in calls[1:]:
            self.submit(each, may_compute=True)
        self.may_go_on.set()
        self.wait_answers(len(calls))


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.queue.close()


def test_caller_that_may_computes_at_once_on_its_own_thread(lab: Lab) -> None:
    lab.submit(call(1), may_compute=True)
    assert set(lab.answers) == {1}
    assert lab.computed_by == [threading.current_thread().name]


def test_caller_that_may_not_is_answered_by_the_queues_thread(lab: Lab) -> None:
    lab.submit(call(1), may_compute=False)
    lab.wait_answers(1)
    assert lab.computed_by[0].startswith("experts")


def test_kernels_are_started_once_by_whoever_computes_first(lab: Lab) -> None:
    for number in range(3):
        lab.submit(call(number), may_compute=number == 1)
        lab.wait_answers(number + 1)
    assert len(lab.starts) == 1
    assert lab.starts[0].startswith("experts")


def test_calls_of_a_layer_that_wait_at_the_same_moment_are_computed_together(lab: Lab) -> None:
    lab.hold(call(1), call(2), call(3, layer_idx=7), call(4), call(5, layer_idx=7), call(6, layer_idx=2))
    assert lab.batches == [[1], [2, 4], [3, 5], [6]]


def test_caller_is_not_kept_while_another_computes(lab: Lab) -> None:
    """Nobody who brings calls computes what others brought meanwhile: `hold` would never end."""
    lab.hold(call(1), call(2))
    assert threading.current_thread().name not in lab.computed_by


def test_answers_say_how_many_rows_wait(lab: Lab) -> None:
    lab.hold(call(1), call(2, rows=3), call(3, rows=5, layer_idx=9), call(4, rows=4))
    assert {number: answer.queue_rows for number, answer in lab.answers.items()} == {1: 12, 2: 5, 3: 0, 4: 5}
    assert lab.metrics.registry.get_sample_value("moray_expert_queue_rows") == 0


def test_frame_without_tensors_counts_no_rows(lab: Lab) -> None:
    lab.submit(Frame(kind=FrameKind.FORWARD, call_id=3), may_compute=True)
    assert lab.answers[3].queue_rows == 0


def test_queues_own_thread_is_announced(lab: Lab) -> None:
    lab.submit(call(1), may_compute=True)
    assert lab.announced == []
    lab.submit(call(2), may_compute=False)
    lab.wait_answers(2)
    assert lab.announced == lab.computed_by[1:]
