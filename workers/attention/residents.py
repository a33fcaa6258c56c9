"""The sequences that an engine holds, from the queue to their last token, and the pages that they have.

Carries plans out: it gives and takes pages, and tells sinks what became of their sequences. It computes
nothing; the engine's thread is its only user, but for the gate.
"""

import logging
import time
from collections.abc import Iterable
from typing import Protocol

from wire.errors import DeadlinePassed, InvalidRequest, MorayError, Overloaded
from wire.metrics import Metrics
from workers.attention.accounts import TenantAccounts, token_cost
from workers.attention.gate import Gate, QueueLimits
from workers.attention.lobby import Lobby
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.scheduler import Candidate, StepPlan
from workers.attention.types import (
    Admitted,
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

_PATIENCE = 2
"""Times the longest wait that is foreseen: a guess that was a little low is no reason to refuse late."""
_CHECK_EVERY = 64
"""Sequences that end between two checks of the page accounts, while there are others."""


class GiveRows(Protocol):
    """Hands cached rows on to the worker that wants them, if one does."""

    def __call__(self, sequence: SequenceState, *, begin: int) -> None:
        """Those of a sequence from a position on."""


class Residents:
    """Sequences by key, in order of arrival."""

    def __init__(
        self,
        *,
        pages: PageAllocator,
        prefix: PrefixCache,
        queue: QueueLimits,
        context_cost_tokens: int,
        give_rows: GiveRows,
        metrics: Metrics,
    ) -> None:
        self.gate = Gate(queue)
        """Counts those that wait; entered before a sequence comes here."""
        self.lobby = Lobby(pages=pages, prefix=prefix, lookahead_tokens=queue.lookahead_tokens)
        self.accounts = TenantAccounts()
        self._pages = pages
        self._prefix = prefix
        self._max_wait_s = queue.max_wait_s
        self._context_cost_tokens = context_cost_tokens
        self._give_rows = give_rows
        self._metrics = metrics
        self._sequences: dict[Key, SequenceState] = {}
        self._num_dropped = 0

    def all(self) -> list[SequenceState]:
        """Every sequence, the oldest first."""
        return list(self._sequences.values())

    def find(self, key: Key, *, phase: Phase | None = None) -> SequenceState | None:
        """The sequence of a key, in that phase if one is given."""
        sequence = self._sequences.get(key)
        return sequence if sequence is not None and phase in (None, sequence.phase) else None

    def candidates(self) -> list[Candidate]:
        """What the scheduler must know of each that waits for nothing but its turn."""
        return [self.lobby.candidate(s) for s in self._sequences.values() if not s.is_fetching]

    def take(self, spec: SequenceSpec, sink: Sink, *, began_s: float) -> None:
        """Puts a sequence in line, or tells its sink why not.

        Args:
            spec: the sequence; it has entered the gate.
            sink: hears of it.
            began_s: when it came.
        """
        refusal: MorayError | None = self.lobby.too_long(spec.num_reserved_tokens, field="max_tokens")
        if spec.key in self._sequences:
            refusal = InvalidRequest(f"request {spec.key} is running already", field="request_id")
        if refusal is not None:
            self.turn_away(spec, sink, refusal)
            return
        sequence = SequenceState(spec, sink, token_ids=list(spec.token_ids))
        sequence.patience_s = began_s + _PATIENCE * self._max_wait_s
        if spec.deadline_ms:
            sequence.deadline_s = began_s + spec.deadline_ms / 1000
        self._prefix.expect(sequence)
        self.accounts.enter(spec.tenant)
        self._sequences[spec.key] = sequence

    def turn_away(self, spec: SequenceSpec, sink: Sink, error: MorayError) -> None:
        """Refuses a sequence that has entered the gate."""
        self.gate.leave(spec.num_reserved_tokens, now_s=time.monotonic(), is_served=False)
        sink(Failed(error))

    def apply(self, plan: StepPlan) -> None:
        """Carries out all of a plan but what runs."""
        for key in plan.fail:
            left_ms = self._sequences[key].spec.deadline_ms
            error = DeadlinePassed(f"{key} cannot have a token in the {left_ms} ms that it has")
            self._refuse(key, error, reason="deadline")
        for key in plan.refuse:
            wait_s = self._max_wait_s
            message = f"{key} waited {_PATIENCE * wait_s:g} s for KV pages; try again in {wait_s:g} s"
            self._refuse(key, Overloaded(message, retry_after_s=wait_s), reason="patience")
        if plan.preempt is not None:
            self.restart(self._sequences[plan.preempt])
        for key, num_pages in plan.grow:
            self._sequences[key].pages = self._pages.extend(key, num_pages=num_pages)
        for key in plan.admit:
            self._admit(self._sequences[key])

    def reuse(self) -> None:
        """Skips what other sequences have computed by now."""
        for sequence in self._sequences.values():
            if sequence.phase is Phase.PREFILL:
                begin = sequence.num_cached_tokens
                self._prefix.adopt(sequence)
                if sequence.num_cached_tokens > begin:
                    self._give_rows(sequence, begin=begin)

    def costs(self, running: Iterable[tuple[SequenceState, int]]) -> list[float]:
        """What it costs to compute so many next tokens of each sequence."""
        return [
            token_cost(n, first_position=s.num_cached_tokens, context_cost_tokens=self._context_cost_tokens)
            for s, n in running
        ]

    def advance(self, sequence: SequenceState, *, cost: float = 0.0) -> None:
        """More of its rows are there, at a cost to its tenant: full pages are for others, too."""
        self.accounts.charge(sequence.spec.tenant, cost)
        self._prefix.publish(sequence)

    def append(self, sequence: SequenceState, token: ChosenToken) -> None:
        """One more token; ends the sequence when it is the last. Nothing when it has ended already."""
        if sequence.spec.key not in self._sequences:
            return
        if token.problem and sequence.spec.matcher is not None:
            field = sequence.spec.matcher.field
            message = f"{field}: wanted one that can be followed within the limits; got {token.problem}"
            self.fail([sequence], InvalidRequest(message, field=field))
            return
        sequence.token_ids.append(token.token_id)
        sequence.phase = Phase.DECODE
        finish = None
        if token.token_id in sequence.spec.stop_token_ids:
            finish = Finish.STOP
        elif sequence.num_new_tokens >= sequence.spec.max_tokens:
            finish = Finish.LENGTH
        if finish is not None or sequence.spec.source is Source.PREFILL_ONLY:
            self.drop(sequence)
        num_reused_tokens = sequence.num_reused_tokens if sequence.num_new_tokens == 1 else 0
        sequence.sink(NewToken(token.token_id, finish, num_reused_tokens, token.logprobs))

    def drop(self, sequence: SequenceState) -> None:
        """Forgets a sequence; its pages are nobody's afterwards."""
        spec = sequence.spec
        del self._sequences[spec.key]
        self.accounts.leave(spec.tenant)
        if not sequence.was_admitted:
            self.gate.leave(spec.num_reserved_tokens, now_s=time.monotonic(), is_served=False)
        self._pages.release(spec.key)
        self._num_dropped += 1
        # All pages are counted: with 100,000 of them that takes as long as a step.
        if not self._sequences or self._num_dropped % _CHECK_EVERY == 0:
            self._check_pages()

    def fail(self, sequences: Iterable[SequenceState], error: MorayError) -> None:
        """Ends sequences, unfinished; one that has ended already has ended well."""
        for sequence in sequences:
            if sequence.spec.key in self._sequences:
                self.drop(sequence)
                sequence.sink(Failed(error))

    def restart(self, sequence: SequenceState) -> None:
        """Takes its pages, which stay cached while nobody wants them; it is computed again in its turn."""
        self._metrics.counter("preemptions_total", state=sequence.phase.value).inc()
        if sequence.phase is Phase.RECEIVING:
            sequence.sink(RowsUnwanted())
        self._pages.release(sequence.spec.key)
        sequence.give_up_pages()
        self._prefix.expect(sequence)

    def check_integrity(self) -> None:
        """Checks the page accounts, and that pages belong to sequences.

        Raises:
            RuntimeError: says what is wrong.
        """
        self._pages.check_integrity()
        if self._prefix.tiers is not None:
            self._prefix.tiers.check_integrity()
        with_pages = [key for key, sequence in self._sequences.items() if sequence.pages]
        if set(with_pages) != set(self._pages.owners()):
            raise RuntimeError(
                f"pages belong to {self._pages.owners()}, sequences with pages are {with_pages}"
            )

    def _check_pages(self) -> None:
        try:
            self._pages.check_integrity()
        except RuntimeError:
            self._metrics.counter("integrity_errors_total").inc()
            _log.exception("page accounts are wrong")

    def _refuse(self, key: Key, error: MorayError, *, reason: str) -> None:
        self._metrics.counter("refused_total", reason=reason).inc()
        self.fail([self._sequences[key]], error)

    def _admit(self, sequence: SequenceState) -> None:
        self._prefix.reserve(sequence, num_rows=self.lobby.num_first_rows(sequence))
        sequence.phase = Phase.RECEIVING if sequence.is_remote else Phase.PREFILL
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self.gate.leave(sequence.spec.num_reserved_tokens, now_s=time.monotonic(), is_served=True)
            sequence.sink(Admitted(sequence.num_cached_tokens))
        if sequence.num_cached_tokens:
            self._give_rows(sequence, begin=0)
