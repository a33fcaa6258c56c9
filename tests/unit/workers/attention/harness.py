"""An engine of a reference checkpoint with every expert in this process, and doors to hold it at."""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from model.batch import PendingRows
from model.checkpoint import Checkpoint
from model.weights import Packing
from tests.reference_data import checkpoint_dir
from wire.errors import MorayError
from wire.metrics import Metrics
from wire.phases import Phase as StepPhase
from workers.attention.build import EngineConfig, InProcessExperts, build_engine
from workers.attention.drafter import Speculation
from workers.attention.engine import Engine
from workers.attention.moe import Experts
from workers.attention.types import (
    Admitted,
    CacheRows,
    Event,
    Failed,
    Finish,
    NewToken,
    Sampling,
    SequenceSpec,
    Source,
)
from workers.config import AttentionConfig, ComputeConfig, KvConfig, MtpConfig
from workers.packing import make_packing

WAIT_S = 30
PAGE_TOKENS = 4


def make_spec(
    prompt: Sequence[int], *, request_id: str = "r", attempt: int = 0, max_tokens: int = 8, **fields: Any
) -> SequenceSpec:
    """A greedy local sequence unless the fields say otherwise."""
    base: dict[str, Any] = {
        "num_prompt_tokens": len(prompt),
        "stop_token_ids": frozenset(),
        "sampling": Sampling(),
        "source": Source.LOCAL,
    }
    return SequenceSpec(
        request_id=request_id,
        attempt=attempt,
        token_ids=tuple(prompt),
        max_tokens=max_tokens,
        **{**base, **fields},
    )


@functools.cache
def open_reference(shape: str) -> tuple[Checkpoint, Packing, InProcessExperts]:
    """A checkpoint and its experts; nothing in them changes."""
    checkpoint = Checkpoint.open(checkpoint_dir(shape))
    packing = make_packing(AttentionConfig(), ComputeConfig())
    return checkpoint, packing, InProcessExperts.load(checkpoint, packing)


class DoorExperts:
    """Experts of this process behind a door: a held engine makes one step for each `step`."""

    is_elsewhere = True

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self._permits = threading.Semaphore(0)
        self._is_open = True
        self.num_arrivals = 0
        """Steps that came to the door."""
        self.error: Exception | None = None
        """Raised once, by the next call of a layer."""
        self.on_layer: Callable[[int], None] = lambda _: None
        """Told which layer calls."""

    def hold(self) -> None:
        self._is_open = False

    def step(self, num_steps: int = 1) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._is_open = True
        self._permits.release()

    def begin_step(self, phase: StepPhase) -> None:
        self.num_arrivals += 1
        if not self._is_open and not self._permits.acquire(timeout=WAIT_S):
            raise TimeoutError("nobody opened the door")
        self._experts.begin_step(phase)

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        self.on_layer(layer_idx)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self._experts(layer_idx, x_TD, ids_TK, weights_TK)


class Listener:
    """The sink of one sequence."""

    def __init__(self, spec: SequenceSpec) -> None:
        self.spec = spec
        self.events: list[Event] = []
        self.num_told = 0
        """Events told, read or not."""
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.num_told += 1
        self._queue.put(event)

    def next(self) -> Event:
        event = self._queue.get(timeout=WAIT_S)
        self.events.append(event)
        return event

    def is_silent(self) -> bool:
        """Whether nothing is left to read."""
        return self._queue.empty()

    def until(self, is_it: Callable[[Event], bool]) -> list[Event]:
        """Events up to and with the first that `is_it`."""
        for event in iter(self.next, None):
            if is_it(event):
                break
        return self.events

    def admitted(self) -> "Listener":
        self.until(lambda event: isinstance(event, Admitted))
        return self

    def token(self) -> NewToken:
        """The next token."""
        event = self.next()
        while not isinstance(event, NewToken):
            assert not isinstance(event, Failed), event.error
            event = self.next()
        return event

    def tokens(self) -> list[int]:
        """All tokens of a sequence that ends well, those read before too."""
        self.until(lambda event: isinstance(event, Failed) or getattr(event, "finish", None) is not None)
        last = self.events[-1]
        assert not isinstance(last, Failed), last.error
        return [event.token_id for event in self.events if isinstance(event, NewToken)]

    def finish(self) -> Finish | None:
        last = self.events[-1]
        return last.finish if isinstance(last, NewToken) else None

    def rows(self) -> list[CacheRows]:
        """The cache rows that were read."""
        return [event for event in self.events if isinstance(event, CacheRows)]

    def error(self) -> MorayError:
        """Why the sequence failed."""
        self.until(lambda event: isinstance(event, Failed))
        last = self.events[-1]
        assert isinstance(last, Failed)
        return last.error


@dataclass
class Lab:
    """A running engine."""

    engine: Engine
    door: DoorExperts
    metrics: Metrics

    def submit(self, spec: SequenceSpec) -> Listener:
        listener = Listener(spec)
        self.engine.submit(spec, listener)
        return listener

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The engine takes what is submitted meanwhile all at once, before its next step."""
        go_on = threading.Event()
        self.engine._commands.put(lambda: _wait(go_on))
        try:
            yield
        finally:
            go_on.set()

    def run(self, prompt: Sequence[int], **fields: Any) -> list[int]:
        """The tokens of one sequence, alone."""
        fields.setdefault("request_id", f"alone-{next(_NUMBERS)}")
        return self.submit(make_spec(prompt, **fields)).tokens()

    def check(self) -> None:
        """Waits until every command before is carried out, and checks the page accounts."""
        self.engine.check_integrity().result(timeout=WAIT_S)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"moray_attention_{name}", labels) or 0.0

    def until_metric(self, wanted: float, name: str, **labels: str) -> None:
        """Waits for a gauge, which the engine writes after the commands of a turn."""
        self.until(lambda: self.metric(name, **labels) == wanted)

    def until(self, is_so: Callable[[], bool]) -> None:
        """For what no event tells."""
        pause = threading.Event()
        for _ in range(WAIT_S * 500):
            if is_so():
                return
            pause.wait(0.002)
        raise AssertionError("waited in vain")

    def is_empty(self) -> None:
        """All pages are free, by the accounts and by the metric."""
        self.check()
        self.until_metric(0, "pages", state="used")
        assert self.metric("integrity_errors_total") == 0


_NUMBERS = itertools.count()


def _wait(event: threading.Event) -> None:
    event.wait(WAIT_S)


@contextlib.contextmanager
def open_engine(
    shape: str,
    *,
    page_tokens: int = PAGE_TOKENS,
    prefix_reuse: bool = True,
    kv: Mapping[str, Any] = MappingProxyType({}),
    max_drafts: int = 0,
    change_speculation: Callable[[Speculation], Speculation] = lambda speculation: speculation,
    **group: Any,
) -> Iterator[Lab]:
    """An engine that must be empty at the end and whose thread must end."""
    checkpoint, packing, experts = open_reference(shape)
    door, metrics = DoorExperts(experts), Metrics("attention")
    config = EngineConfig(
        group=AttentionConfig(**{"num_pages": 128, **group}),
        kv=KvConfig(page_tokens=page_tokens, prefix_reuse=prefix_reuse, **kv),
        mtp=MtpConfig(max_drafts=max_drafts),
        change_speculation=change_speculation,
    )
    lab = Lab(build_engine(checkpoint, door, packing, config=config, metrics=metrics), door, metrics)
    lab.engine.start()
    try:
        yield lab
        door.open()
        if lab.engine._thread.is_alive():
            lab.is_empty()
    finally:
        door.open()
        lab.engine.stop()
