"""The engine: one thread that owns the model, the pages and every sequence, and runs step after step.

Others talk to it through commands on a queue and hear of it through the sinks of their sequences, so nothing
in here is shared. An empty engine sleeps in `queue.get`.
"""

import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from wire.errors import (
    InternalError,
    MorayError,
    Overloaded,
)
from wire.metrics import Metrics
from workers.attention.accounts import Pace
from workers.attention.cache import PagedCache
from workers.attention.drafter import Speculation
from workers.attention.gate import QueueLimits
from workers.attention.gauges import EngineGauges
from workers.attention.moe import Experts
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.residents import Residents
from workers.attention.runner import StepRunner
from workers.attention.scheduler import Backlog, StepLimits, StepPlan, plan_step
from workers.attention.scoring import Scorer, ScoreSpec
from workers.attention.types import (
    CacheRows,
    ChosenToken,
    Failed,
    Key,
    NewToken,
    Phase,
    SequenceSpec,
    SequenceState,
    Sink,
)

_log = logging.getLogger(__name__)


_TURN_S = 1e-4
"""How long another thread may keep the interpreter from the engine's when that comes back from a kernel;
Python's own 5 ms are several layers."""

_STOPPING = "the worker is shutting down"


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine is made of."""

    transformer: Transformer
    cache: PagedCache
    pages: PageAllocator
    prefix: PrefixCache
    """Gives the pages away."""
    experts: Experts
    limits: StepLimits
    queue: QueueLimits
    metrics: Metrics
    speculation: Speculation | None = None
    """Drafts tokens; None = nothing does."""


class Engine:
    """Runs sequences; public methods may be called from any thread and return at once."""

    def __init__(self, parts: EngineParts) -> None:
        self._transformer = parts.transformer
        self._cache = parts.cache
        self._pages = parts.pages
        self._experts = parts.experts
        self._limits = parts.limits
        self._metrics = parts.metrics
        self._runner = StepRunner(
            transformer=parts.transformer,
            cache=parts.cache,
            experts=parts.experts,
            limits=parts.limits,
            metrics=parts.metrics,
            speculation=parts.speculation,
        )
        self._gauges = EngineGauges(parts.metrics, pages=parts.pages, transformer=parts.transformer)
        self._residents = Residents(
            pages=parts.pages,
            prefix=parts.prefix,
            queue=parts.queue,
            context_cost_tokens=parts.limits.context_cost_tokens,
            give_rows=self._runner.give_rows,
            metrics=parts.metrics,
        )
        self._scorer = Scorer(
            transformer=parts.transformer, cache=parts.cache, pages=parts.pages, experts=parts.experts
        )
        self._pace = Pace()
        # Not a SimpleQueue: its `get` may wait for ever when its timeout ends as it wakes (CPython 3.11).
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._is_stopping = False
        self._tiers = parts.prefix.tiers
        if self._tiers is not None:
            self._tiers.when_fetched(lambda: self._commands.put(_look_again))
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs: without it nothing that is submitted is ever answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fails what is open and ends the thread; returns when it has ended."""
        self._commands.put(self._on_stop)
        if self._thread.is_alive():
            self._thread.join()
        if self._tiers is not None:
            self._tiers.close()

    def submit(self, spec: SequenceSpec, sink: Sink) -> None:
        """Takes a sequence; everything about it arrives at `sink`, a refusal before this returns."""
        now_s = time.monotonic()
        overloaded = self._residents.gate.enter(spec.num_reserved_tokens, now_s=now_s)
        if overloaded is not None:
            # Said here and now: the engine's thread may be in a long step.
            self._metrics.counter("refused_total", reason="queue").inc()
            sink(Failed(overloaded))
            return
        self._commands.put(lambda: self._on_submit(spec, sink, now_s))

    def cancel(self, spec: SequenceSpec) -> None:
        """Forgets a sequence and frees its pages; nothing when it is over or was refused.

        The sequence is that of the very object given to `submit`: another one under the same key goes on.
        """
        self._commands.put(lambda: self._on_cancel(spec))

    @property
    def model(self) -> ModelConfig:
        """What it runs."""
        return self._transformer.config

    @property
    def cache(self) -> PagedCache:
        """Its cache; only the engine thread may read or write rows."""
        return self._cache

    def add_rows(self, key: Key, rows: CacheRows) -> None:
        """Stores cache rows that a prefill worker sent, accepted by a `Receipt`."""
        self._commands.put(lambda: self._on_rows(key, rows))

    def finish_transfer(self, key: Key, token: NewToken) -> None:
        """All rows were sent, and this is the first new token."""
        self._commands.put(lambda: self._on_transferred(key, token))

    def compute_here(self, key: Key) -> None:
        """Nobody sends the rows of a sequence that waits for them: it is prefilled here."""
        self._commands.put(lambda: self._on_compute_here(key))

    def score(self, spec: ScoreSpec) -> "Future[dict[str, Tensor]]":
        """Scores a prompt between two steps; fails with Overloaded when the pages do not suffice now."""
        future: Future[dict[str, Tensor]] = Future()
        self._commands.put(lambda: self._on_score(spec, future))
        return future

    def check_integrity(self) -> "Future[None]":
        """Checks the page accounts on the engine's thread; the future fails with what is wrong."""
        future: Future[None] = Future()
        self._commands.put(lambda: self._on_check(future))
        return future

    def wait_step(self) -> "Future[None]":
        """Resolves between two steps: none that had begun before the call goes on."""
        future: Future[None] = Future()
        self._commands.put(lambda: _resolve(future))
        return future

    # ---- the engine thread ----

    @torch.inference_mode()
    def _loop(self) -> None:
        self._transformer.start()
        sys.setswitchinterval(_TURN_S)
        self._gauges.show(self._residents.all())
        while not self._is_stopping:
            self._residents.reuse()
            plan = plan_step(
                self._residents.candidates(),
                num_free_pages=self._pages.num_available,
                now_s=time.monotonic(),
                backlog=Backlog(self._residents.accounts.served, self._pace.seconds_per_cost),
                limits=self._limits,
            )
            self._residents.apply(plan)
            if plan.run:
                self._run_guarded(plan)
            elif plan.is_idle:
                self._wait_command()
            while not self._commands.empty():
                self._commands.get()()
            self._gauges.show(self._residents.all())

    def _wait_command(self) -> None:
        """Runs the next command; returns without one when somebody's patience is over."""
        ends_s = [s.patience_s for s in self._residents.all() if s.phase is Phase.WAITING]
        timeout_s = min(ends_s, default=math.inf) - time.monotonic()
        try:
            command = self._commands.get(timeout=None if timeout_s == math.inf else max(timeout_s, 0))
        except queue.Empty:
            return
        command()

    def _run_guarded(self, plan: StepPlan) -> None:
        found = [(self._residents.find(key), num_tokens) for key, num_tokens in plan.run]
        running = [(sequence, num_tokens) for sequence, num_tokens in found if sequence is not None]
        try:
            self._run(running)
        except MorayError as error:
            self._residents.fail([sequence for sequence, _ in running], error)
        except Exception as error:  # noqa: BLE001  the thread must live on; mapped, logged, told to the callers
            _log.exception("engine step failed")
            message = f"engine step: {type(error).__name__}: {error}"
            self._residents.fail([sequence for sequence, _ in running], InternalError(message))

    def _run(self, running: list[tuple[SequenceState, int]]) -> None:
        costs = self._residents.costs(running)
        began_s = time.monotonic()
        new_tokens = self._runner.run(running)
        self._pace.observe(cost=sum(costs), seconds=time.monotonic() - began_s)
        for (sequence, _), cost in zip(running, costs, strict=True):
            self._residents.advance(sequence, cost=cost)
        for sequence, tokens in new_tokens:
            for token in tokens:
                self._residents.append(sequence, token)

    # ---- commands, run on the engine thread ----

    def _on_submit(self, spec: SequenceSpec, sink: Sink, began_s: float) -> None:
        if self._is_stopping:
            self._residents.turn_away(spec, sink, Overloaded(_STOPPING))
        else:
            self._residents.take(spec, sink, began_s=began_s)

    def _on_cancel(self, spec: SequenceSpec) -> None:
        sequence = self._residents.find(spec.key)
        if sequence is not None and sequence.spec is spec:
            self._residents.drop(sequence)

    def _on_rows(self, key: Key, rows: CacheRows) -> None:
        sequence = self._residents.find(key, phase=Phase.RECEIVING)
        if sequence is None:
            self._metrics.counter("kv_refused_total", reason="not_receiving").inc()
            return
        begin, end = rows.first_token_idx, rows.first_token_idx + rows.rows_TB.shape[0]
        # The copy is needed: the array is a read-only view of the received bytes.
        flat_T = self._cache.flat_rows(sequence.pages, begin=begin, end=end)
        self._cache.write(rows.layer_idx, flat_T, torch.from_numpy(rows.rows_TB.copy()).to(flat_T.device))
        self._metrics.counter("kv_bytes_total", direction="received").inc(rows.rows_TB.nbytes)

    def _on_transferred(self, key: Key, token: NewToken) -> None:
        sequence = self._residents.find(key, phase=Phase.RECEIVING)
        if sequence is None:
            return
        is_whole = sequence.spec.takes_first_token
        sequence.num_cached_tokens = len(sequence.spec.token_ids) - (0 if is_whole else 1)
        # Either worker had that much: those tokens were not computed for this request.
        num_reused_tokens = max(sequence.num_reused_tokens, token.num_cached_tokens)
        sequence.num_reused_tokens = min(num_reused_tokens, sequence.num_cached_tokens)
        self._residents.advance(sequence)
        if is_whole:
            self._residents.append(sequence, ChosenToken(token.token_id))
        else:
            sequence.phase = Phase.PREFILL

    def _on_compute_here(self, key: Key) -> None:
        sequence = self._residents.find(key, phase=Phase.RECEIVING)
        if sequence is None:
            return
        if sequence.num_pending_tokens:
            sequence.phase = Phase.PREFILL
        else:
            # Every row is there, and none may be written: it comes back with a last page of its own.
            self._residents.restart(sequence)

    def _on_score(self, spec: ScoreSpec, future: "Future[dict[str, Tensor]]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        too_long = self._residents.lobby.too_long(len(spec.token_ids), field="tokens")
        try:
            if too_long is not None:
                raise too_long
            future.set_result(self._scorer.score(spec))
        except Exception as error:  # noqa: BLE001  re-raised where the future is read
            future.set_exception(error)

    def _on_check(self, future: "Future[None]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._residents.check_integrity()
            future.set_result(None)
        except RuntimeError as error:
            future.set_exception(error)

    def _on_stop(self) -> None:
        self._is_stopping = True
        self._residents.fail(self._residents.all(), Overloaded(_STOPPING))


def _look_again() -> None:
    """A command that does nothing: the engine plans again."""


def _resolve(future: "Future[None]") -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(None)
