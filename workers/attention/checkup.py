"""Looks after an engine: is it between two steps now and then, and does it still make tokens? A shell."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from wire.errors import MorayError, Overloaded
from workers.attention.engine import Engine
from workers.attention.health import HealthRules, Signs, Verdict, judge
from workers.attention.relay import EventRelay
from workers.attention.types import Event, Failed, NewToken, Sampling, SequenceSpec, Source

_EVERY_S = 1.0


class Checkup:
    """One engine's; runs on one asyncio loop."""

    def __init__(
        self, engine: Engine, *, relay: EventRelay, rules: HealthRules, on_verdict: Callable[[Verdict], None]
    ) -> None:
        """Makes one that has looked at nothing yet.

        Args:
            engine: the engine.
            relay: brings its events to the loop, and calls `on_event`.
            rules: how long is too long.
            on_verdict: hears of every verdict that differs from the one before.
        """
        self._engine = engine
        self._relay = relay
        self._rules = rules
        self._on_verdict = on_verdict
        self._signs = Signs(has_table=False)
        self._ping: Future[None] | None = None
        """Resolves when the engine is between two steps."""
        self._pinged_s = 0.0
        self._token_s = 0.0
        """When the engine last made a token; before everything at start."""
        self._probe: asyncio.Task[None] | None = None
        self._num_probes = 0
        self.verdict = judge(self._signs, rules)
        """The newest."""

    def leave(self) -> None:
        """The worker takes nothing new any more."""
        self._signs = replace(self._signs, is_leaving=True)
        self._judge()

    def on_cluster(self, *, has_table: bool, has_experts: bool) -> None:
        """What the newest snapshot says."""
        self._signs = replace(self._signs, has_table=has_table, has_experts=has_experts)
        self._judge()

    def on_event(self, event: Event) -> None:
        """Every event of every sequence: tokens spare a probe, failures ask for one."""
        if isinstance(event, NewToken):
            self._token_s = asyncio.get_running_loop().time()
            self._on_probed(None)
        elif isinstance(event, Failed) and not event.error.is_retryable:
            self._token_s = 0.0

    async def run(self) -> None:
        """Looks every second until cancelled."""
        try:
            while True:
                self._look(asyncio.get_running_loop().time())
                await asyncio.sleep(_EVERY_S)
        finally:
            if self._probe is not None:
                self._probe.cancel()
                await asyncio.gather(self._probe, return_exceptions=True)

    def _look(self, now_s: float) -> None:
        if self._ping is None or self._ping.done():
            self._ping, self._pinged_s = self._engine.wait_step(), now_s
        self._signs = replace(
            self._signs, is_engine_alive=self._engine.is_alive, step_s=now_s - self._pinged_s
        )
        self._judge()
        is_probing = self._probe is not None and not self._probe.done()
        can_tell = self._signs.has_table and self._signs.has_experts and not self._signs.is_leaving
        is_due = now_s - self._token_s >= self._rules.probe_s or self._signs.probe_error is not None
        if self._rules.probe_s and is_due and can_tell and not is_probing:
            self._probe = asyncio.create_task(self._make_token(), name="probe")

    async def _make_token(self) -> None:
        """One token of a sequence of its own."""
        self._num_probes += 1
        spec = SequenceSpec(
            request_id="probe",
            attempt=self._num_probes,
            token_ids=(0,),
            num_prompt_tokens=1,
            max_tokens=1,
            stop_token_ids=frozenset(),
            sampling=Sampling(),
            source=Source.LOCAL,
        )
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._engine.submit(spec, self._relay.sink(events))
        try:
            while not isinstance(event := await events.get(), NewToken):
                if isinstance(event, Failed):
                    # A worker that is full has work, and shows by that whether it is well.
                    self._on_probed(None if isinstance(event.error, Overloaded) else event.error)
                    return
        finally:
            self._engine.cancel(spec)

    def _on_probed(self, error: MorayError | None) -> None:
        num_failed = 0 if error is None else self._signs.num_failed_probes + 1
        self._signs = replace(self._signs, probe_error=error, num_failed_probes=num_failed)
        self._judge()

    def _judge(self) -> None:
        verdict = judge(self._signs, self._rules)
        if verdict != self.verdict:
            self.verdict = verdict
            self._on_verdict(verdict)
