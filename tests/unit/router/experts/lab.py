"""A dispatcher whose time and expert workers the test holds: nothing waits, sleeps or starts a thread."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import router.experts.dispatcher
import router.experts.pending
from router.experts.dispatcher import DispatchRules, ExpertDispatcher, PendingDispatch
from router.experts.plan import WorkerCall
from router.experts.table import RoutingTable, build_table
from tests.unit.router.experts.harness import LAYER, Choices, copies, partial_sums
from wire.errors import MorayError
from wire.frames import Frame, FrameKind
from wire.metrics import Metrics
from wire.phases import Phase

Answer = Frame | MorayError


@dataclass(frozen=True)
class Later:
    """An answer that takes its time."""

    delay_s: float
    answer: Answer


Script = Callable[[int, str, Frame], Answer | Later | None]
"""(number of the call, worker, frame) -> what comes back; None = never."""


class FakeClock:
    """Time that passes only while someone waits; what was planned for then happens then."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def monotonic(self) -> float:
        return self.now_s

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._numbers), event))

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """As threading.Condition's."""
        assert timeout is not None, "whoever waits here must know for how long"
        ends_s = self.now_s + max(timeout, 0.0)
        while not predicate() and self._events and self._events[0][0] <= ends_s:
            at_s, _, event = heapq.heappop(self._events)
            self.now_s = max(self.now_s, at_s)
            event()
        if not predicate():
            self.now_s = ends_s
        return predicate()

    def pass_s(self, seconds: float) -> None:
        """Nobody waits, but time passes."""
        self.wait_for(lambda: False, seconds)


class FakeCondition(threading.Condition):
    """Waits by a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.wait_for = clock.wait_for


class FakeEvent(threading.Event):
    """Waits by a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        return self._clock.wait_for(self.is_set, timeout)


def partial_of(frame: Frame) -> Frame:
    """What an honest expert worker answers."""
    x_RD, row_idx_A, expert_idx_A, weight_A = frame.tensors
    call = WorkerCall("", np.arange(len(x_RD)), row_idx_A, expert_idx_A, weight_A)
    return replace(frame, kind=FrameKind.PARTIAL, tensors=(partial_sums(x_RD, call),))


def honest(number: int, worker_id: str, frame: Frame) -> Answer:
    return partial_of(frame)


class FakeTransport:
    """Answers by a script and keeps what was sent."""

    def __init__(self, script: Script, clock: FakeClock) -> None:
        self.script = script
        self.sent: list[tuple[str, Frame]] = []
        self._clock = clock

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        self.sent.append((worker_id, frame))
        future: Future[Frame] = Future()
        answer = self.script(len(self.sent) - 1, worker_id, frame)
        if isinstance(answer, Later):
            later = answer.answer
            self._clock.after(answer.delay_s, lambda: _fulfil(future, later))
        elif answer is not None:
            _fulfil(future, answer)
        return future

    def close(self) -> None:
        pass


def _fulfil(future: "Future[Frame]", answer: Answer) -> None:
    if isinstance(answer, MorayError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class Lab:
    """A dispatcher in fake time, with a table in force unless none is given."""

    def __init__(
        self, script: Script, *, clock: FakeClock, table: RoutingTable | None, rules: DispatchRules
    ) -> None:
        self.clock = clock
        self.transport = FakeTransport(script, clock)
        self.metrics = Metrics("attention")
        self.dispatcher = ExpertDispatcher(self.transport, rules=rules, metrics=self.metrics)
        self.book = self.dispatcher.book
        if table is not None:
            self.adopt(table)

    def adopt(self, table: RoutingTable, phase: Phase = "decode") -> None:
        """A newer table comes, and a step begins."""
        self.dispatcher.set_table(table)
        self.dispatcher.adopt_table(phase)

    def start(self, given_choices: Choices) -> PendingDispatch:
        return self.dispatcher.start(
            LAYER, given_choices.x_TD, given_choices.ids_TK, given_choices.weights_TK
        )

    def run(self, given_choices: Choices) -> np.ndarray:
        return self.start(given_choices).result()

    @property
    def asked(self) -> list[str]:
        """Workers in the order of their calls."""
        return [worker for worker, _ in self.transport.sent]

    @property
    def frames(self) -> list[Frame]:
        return [frame for _, frame in self.transport.sent]

    def metric(self, name: str, **labels: str) -> float | None:
        """None = not exported."""
        return self.metrics.registry.get_sample_value(f"moray_attention_{name}", labels)


@contextmanager
def lab(
    script: Script = honest, *, table: RoutingTable | None = None, rules: DispatchRules | None = None
) -> Iterator[Lab]:
    """A dispatcher whose modules see a clock that starts at 100 s; without `table` it has none yet."""
    clock = FakeClock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (router.experts.dispatcher, router.experts.pending):
            patch.setattr(module, "time", clock)
            threads = SimpleNamespace(Condition=lambda: FakeCondition(clock), Event=lambda: FakeEvent(clock))
            patch.setattr(module, "threading", threads)
        yield Lab(script, clock=clock, table=table, rules=rules or DispatchRules())


def two_workers(version: int = 1, *, split: int = 3) -> RoutingTable:
    """Six experts: those below `split` on worker a, the others on worker b."""
    return placed(version, [[int(expert >= split)] for expert in range(6)], names="ab")


def twins(version: int = 1, *, names: str = "ab") -> RoutingTable:
    """Six experts, every one on every worker."""
    return placed(version, [list(range(len(names)))] * 6, names=names)


def placed(
    version: int,
    workers_of: list[list[int]],
    *,
    names: str,
    worker_phases: Mapping[str, Phase] | None = None,
) -> RoutingTable:
    """Expert i on the workers workers_of[i], in equal shares; workers have names of one letter."""
    replicas = [r for e, workers in enumerate(workers_of) for r in copies(e, workers, [1] * len(workers))]
    return build_table(
        version=version,
        num_experts=len(workers_of),
        worker_ids=list(names),
        layers={LAYER: replicas},
        worker_phases=worker_phases,
    )
