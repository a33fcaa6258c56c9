"""The engine: one thread that owns the model, the pages and every sequence, and runs step after step.

Others talk to it through commands on a queue and hear of it through the sinks of their sequences, so nothing
in here is shared. An empty engine sleeps in `queue.get`.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from wire.errors import (
    DeadlinePassed,
    FrameInvalid,
    InternalError,
    InvalidRequest,
    MorayError,
    Overloaded,
)
from wire.metrics import Metrics
from workers.attention.accounts import Pace, TenantAccounts, token_cost
from workers.attention.cache import PagedCache
from workers.attention.drafter import Speculation
from workers.attention.gate import Gate, QueueLimits
from workers.attention.gauges import EngineGauges
from workers.attention.lobby import Lobby
from workers.attention.moe import Experts
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.runner import StepRunner
from workers.attention.scheduler import Backlog, StepLimits, StepPlan, plan_step
from workers.attention.scoring import ScoreSpec, score_prompt
from workers.attention.types import (
    Admitted,
    CacheRows,
    ChosenToken,
    Failed,
    Finish,
    Key,
    NewToken,
    Phase,
    RowsUnwanted,
    SequenceSpec,
    SequenceState,
    Sink,
    Source,
)

_log = logging.getLogger(__name__)

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
        self._prefix = parts.prefix
        self._experts = parts.experts
        self._limits = parts.limits
        self._max_queue_s = parts.queue.max_wait_s
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
        self._lobby = Lobby(
            pages=parts.pages, prefix=parts.prefix, lookahead_tokens=parts.queue.lookahead_tokens
        )
        self._gate = Gate(parts.queue)
        self._accounts = TenantAccounts()
        self._pace = Pace()
        self._sequences: dict[Key, SequenceState] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fails what is open and ends the thread; returns when it has ended."""
        self._commands.put(self._on_stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, spec: SequenceSpec, sink: Sink) -> None:
        """Takes a sequence; everything about it arrives at `sink`, a refusal before this returns."""
        now_s = time.monotonic()
        overloaded = self._gate.enter(spec.num_reserved_tokens, now_s=now_s)
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
        self._gauges.show(self._sequences.values())
        while not self._is_stopping:
            self._reuse()
            plan = plan_step(
                [self._lobby.candidate(sequence) for sequence in self._sequences.values()],
                num_free_pages=self._pages.num_available,
                now_s=time.monotonic(),
                backlog=Backlog(self._accounts.served, self._pace.seconds_per_cost),
                limits=self._limits,
            )
            self._apply(plan)
            if plan.run:
                self._run_guarded(plan)
            elif plan.is_idle:
                self._wait_command()
            while not self._commands.empty():
                self._commands.get()()
            self._gauges.show(self._sequences.values())

    def _wait_command(self) -> None:
        """Runs the next command; returns without one when somebody's patience is over."""
        ends_s = [s.patience_s for s in self._sequences.values() if s.phase is Phase.WAITING]
        timeout_s = min(ends_s, default=math.inf) - time.monotonic()
        try:
            command = self._commands.get(timeout=None if timeout_s == math.inf else max(timeout_s, 0))
        except queue.Empty:
            return
        command()

    def _apply(self, plan: StepPlan) -> None:
        for key in plan.fail:
            sequence = self._sequences[key]
            self._metrics.counter("refused_total", reason="deadline").inc()
            message = f"{key} cannot have a token in the {sequence.spec.deadline_ms} ms that it has"
            self._fail([(sequence, 0)], DeadlinePassed(message))
        for key in plan.refuse:
            self._metrics.counter("refused_total", reason="patience").inc()
            retry_after_s = self._max_queue_s
            message = f"{key} waited {retry_after_s:g} s for KV pages; try again in {retry_after_s:g} s"
            error = Overloaded(message, retry_after_s=retry_after_s)
            self._fail([(self._sequences[key], 0)], error)
        if plan.preempt is not None:
            self._preempt(self._sequences[plan.preempt])
        for key, num_pages in plan.grow:
            self._sequences[key].pages = self._pages.extend(key, num_pages=num_pages)
        for key in plan.admit:
            self._admit(self._sequences[key])

    def _preempt(self, sequence: SequenceState) -> None:
        """Takes its pages, which stay cached while nobody wants them; it is computed again in its turn."""
        self._metrics.counter("preemptions_total", state=sequence.phase.value).inc()
        if sequence.phase is Phase.RECEIVING:
            sequence.sink(RowsUnwanted())
        self._pages.release(sequence.spec.key)
        sequence.give_up_pages()
        self._prefix.expect(sequence)

    def _admit(self, sequence: SequenceState) -> None:
        self._prefix.reserve(sequence, num_rows=self._lobby.num_first_rows(sequence))
        sequence.phase = Phase.RECEIVING if sequence.is_remote else Phase.PREFILL
        if not sequence.was_admitted:
            sequence.was_admitted = True
            num_tokens = sequence.spec.num_reserved_tokens
            self._gate.leave(num_tokens, now_s=time.monotonic(), is_served=True)
            sequence.sink(Admitted(sequence.num_cached_tokens))
        if sequence.num_cached_tokens:
            self._runner.give_rows(sequence, begin=0)

    def _reuse(self) -> None:
        """Skips what other sequences have computed by now."""
        for sequence in self._sequences.values():
            if sequence.phase is Phase.PREFILL:
                begin = sequence.num_cached_tokens
                self._prefix.adopt(sequence)
                if sequence.num_cached_tokens > begin:
                    self._runner.give_rows(sequence, begin=begin)

    def _run_guarded(self, plan: StepPlan) -> None:
        running = [(self._sequences[key], num_tokens) for key, num_tokens in plan.run]
        costs = [self._cost(sequence, num_tokens) for sequence, num_tokens in running]
        began_s = time.monotonic()
        try:
            new_tokens = self._runner.run(running)
            self._pace.observe(cost=sum(costs), seconds=time.monotonic() - began_s)
            for (sequence, _), cost in zip(running, costs, strict=True):
                self._accounts.charge(sequence.spec.tenant, cost)
            for sequence, _ in running:
                self._prefix.publish(sequence)
            for sequence, tokens in new_tokens:
                for token in tokens:
                    # One that ended with an accepted draft gets none of those behind it.
                    if sequence.spec.key in self._sequences:
                        self._append(sequence, token)
        except MorayError as error:
            self._fail(running, error)
        except Exception as error:  # noqa: BLE001  the thread must live on; mapped, logged, told to the callers
            _log.exception("engine step failed")
            self._fail(running, InternalError(f"engine step: {type(error).__name__}: {error}"))

    def _cost(self, sequence: SequenceState, num_tokens: int) -> float:
        return token_cost(
            num_tokens,
            first_position=sequence.num_cached_tokens,
            context_cost_tokens=self._limits.context_cost_tokens,
        )

    def _append(self, sequence: SequenceState, token: ChosenToken) -> None:
        """One more token; ends the sequence when it is the last."""
        if token.problem and sequence.spec.matcher is not None:
            field = sequence.spec.matcher.field
            message = f"{field}: wanted one that can be followed within the limits; got {token.problem}"
            self._fail([(sequence, 0)], InvalidRequest(message, field=field))
            return
        sequence.token_ids.append(token.token_id)
        sequence.phase = Phase.DECODE
        finish = None
        if token.token_id in sequence.spec.stop_token_ids:
            finish = Finish.STOP
        elif sequence.num_new_tokens >= sequence.spec.max_tokens:
            finish = Finish.LENGTH
        if finish is not None or sequence.spec.source is Source.PREFILL_ONLY:
            self._drop(sequence.spec.key)
        num_reused_tokens = sequence.num_reused_tokens if sequence.num_new_tokens == 1 else 0
        sequence.sink(NewToken(token.token_id, finish, num_reused_tokens, token.logprobs))

    def _drop(self, key: Key) -> None:
        """Forgets a sequence; its pages are free afterwards."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._accounts.leave(sequence.spec.tenant)
            if not sequence.was_admitted:
                num_tokens = sequence.spec.num_reserved_tokens
                self._gate.leave(num_tokens, now_s=time.monotonic(), is_served=False)
            self._pages.release(key)
            self._check_pages()

    def _fail(self, running: list[tuple[SequenceState, int]], error: MorayError) -> None:
        for sequence, _ in running:
            # One that got its last token in this very step has ended well.
            if sequence.spec.key in self._sequences:
                self._drop(sequence.spec.key)
                sequence.sink(Failed(error))

    def _check_pages(self) -> None:
        try:
            self._pages.check_integrity()
        except RuntimeError:
            self._metrics.counter("integrity_errors_total").inc()
            _log.exception("page accounts are wrong")

    # ---- commands, run on the engine thread ----

    def _on_submit(self, spec: SequenceSpec, sink: Sink, began_s: float) -> None:
        refusal = self._refusal(spec)
        if refusal is not None:
            self._gate.leave(spec.num_reserved_tokens, now_s=time.monotonic(), is_served=False)
            sink(Failed(refusal))
            return
        sequence = SequenceState(spec, sink, token_ids=list(spec.token_ids))
        sequence.patience_s = began_s + self._max_queue_s
        if spec.deadline_ms:
            sequence.deadline_s = began_s + spec.deadline_ms / 1000
        self._prefix.expect(sequence)
        self._accounts.enter(spec.tenant)
        self._sequences[spec.key] = sequence

    def _refusal(self, spec: SequenceSpec) -> MorayError | None:
        if self._is_stopping:
            return Overloaded(_STOPPING)
        if spec.key in self._sequences:
            return InvalidRequest(f"request {spec.key} is running already", field="request_id")
        return self._lobby.too_long(spec.num_reserved_tokens, field="max_tokens")

    def _on_cancel(self, spec: SequenceSpec) -> None:
        sequence = self._sequences.get(spec.key)
        if sequence is not None and sequence.spec is spec:
            self._drop(spec.key)

    def _on_rows(self, key: Key, rows: CacheRows) -> None:
        sequence = self._sequences.get(key)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            self._metrics.counter("kv_refused_total", reason="not_receiving").inc()
            return
        begin, end = rows.first_token_idx, rows.first_token_idx + rows.rows_TB.shape[0]
        # The copy is needed: the array is a read-only view of the received bytes.
        flat_T = self._cache.flat_rows(sequence.pages, begin=begin, end=end)
        self._cache.write(rows.layer_idx, flat_T, torch.from_numpy(rows.rows_TB.copy()).to(flat_T.device))
        self._metrics.counter("kv_bytes_total", direction="received").inc(rows.rows_TB.nbytes)

    def _on_transferred(self, key: Key, token: NewToken) -> None:
        sequence = self._sequences.get(key)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return
        is_whole = sequence.spec.takes_first_token
        sequence.num_cached_tokens = len(sequence.spec.token_ids) - (0 if is_whole else 1)
        # Either worker had that much: those tokens were not computed for this request.
        num_reused_tokens = max(sequence.num_reused_tokens, token.num_cached_tokens)
        sequence.num_reused_tokens = min(num_reused_tokens, sequence.num_cached_tokens)
        self._prefix.publish(sequence)
        if is_whole:
            self._append(sequence, ChosenToken(token.token_id))
        else:
            sequence.phase = Phase.PREFILL

    def _on_compute_here(self, key: Key) -> None:
        sequence = self._sequences.get(key)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return
        if sequence.num_pending_tokens:
            sequence.phase = Phase.PREFILL
        else:
            message = f"{key}: every row is cached here, and the prefill worker sent no first token"
            self._fail([(sequence, 0)], FrameInvalid(message))

    def _on_score(self, spec: ScoreSpec, future: "Future[dict[str, Tensor]]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        owner = ("score", id(future))
        try:
            future.set_result(self._score(spec, owner))
        except Exception as error:  # noqa: BLE001  re-raised where the future is read
            future.set_exception(error)
        finally:
            self._pages.release(owner)

    def _score(self, spec: ScoreSpec, owner: Hashable) -> dict[str, Tensor]:
        num_tokens = len(spec.token_ids)
        too_long = self._lobby.too_long(num_tokens, field="tokens")
        if too_long is not None:
            raise too_long
        if not self._pages.can_reserve(num_tokens):
            num_pages = self._pages.num_available
            raise Overloaded(f"{num_pages} free pages do not hold the prompt; try later")
        pages = self._pages.reserve(owner, num_tokens=num_tokens)
        return score_prompt(
            spec, transformer=self._transformer, cache=self._cache, pages=pages, experts=self._experts
        )

    def _on_check(self, future: "Future[None]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._pages.check_integrity()
            with_pages = [key for key, sequence in self._sequences.items() if sequence.pages]
            if set(with_pages) != set(self._pages.owners()):
                raise RuntimeError(
                    f"pages belong to {self._pages.owners()}, sequences with pages are {with_pages}"
                )
            future.set_result(None)
        except RuntimeError as error:
            future.set_exception(error)

    def _on_stop(self) -> None:
        self._is_stopping = True
        open_sequences = [(sequence, 0) for sequence in self._sequences.values()]
        self._fail(open_sequences, Overloaded(_STOPPING))


def _resolve(future: "Future[None]") -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(None)
