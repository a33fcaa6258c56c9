"""A request from admission to its last token: attempts on workers, replayed until the stream is whole."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from router.requests.affinity import PrefixAffinity, Trip
from router.requests.attempt import Attempt, AttemptFailed, CallTerms, open_attempt
from router.requests.ledger import Ledger
from router.requests.links import WorkerLinks
from router.requests.members import ClusterView
from router.requests.retry import GiveUp, RetryState, plan_retry
from router.requests.roster import Roster
from router.requests.selection import Route, plan_route
from router.requests.transcript import Transcript
from router.requests.types import AdmittedRequest, Failure, TokenBatch
from router.requests.waiting import WaitingRoom
from wire.errors import DeadlinePassed, NotReady
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import common_pb2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """How long a session keeps trying."""

    num_replays: int
    """Times that a request is started again on other workers."""
    ready_wait_s: float
    """Seconds that it waits for a worker."""
    prefix_pages: int
    """Pages of prompts that the prefix index remembers of each worker."""


class SessionRunner:
    """Runs requests; every one is an async iterator that the caller must close."""

    def __init__(
        self,
        *,
        roster: Roster,
        room: WaitingRoom,
        links: WorkerLinks,
        limits: SessionLimits,
        metrics: Metrics,
    ) -> None:
        self._roster = roster
        self._room = room
        self._links = links
        self._limits = limits
        self._metrics = metrics
        self._affinity = PrefixAffinity(max_pages=limits.prefix_pages, metrics=metrics)
        self.ledger = Ledger()
        """What is in flight; sessions are the only writers."""

    def follow(self, view: ClusterView) -> None:
        """Forgets what workers cached that left the cluster; lets in whom new workers have room for."""
        self._affinity.index.drop_absent(view.present)
        self._room.call_next()

    async def run(self, request: AdmittedRequest, *, end_s: float | None) -> AsyncGenerator[TokenBatch, None]:
        """The new tokens of a request, numbered, until its end mark.

        Args:
            request: the admitted request.
            end_s: loop time at which the client's deadline passes, or None.

        Raises:
            Overloaded: too much waits, here or at every worker.
            MorayError: the request cannot be finished; WorkerLost after the last replay.
        """
        async with (
            self._room.stay(request, end_s=end_s),
            contextlib.aclosing(self._carry_out(request, end_s=end_s)) as batches,
        ):
            async for batch in batches:
                yield batch

    async def _carry_out(
        self, request: AdmittedRequest, *, end_s: float | None
    ) -> AsyncGenerator[TokenBatch, None]:
        """Attempts, one after the other, until the stream is whole."""
        transcript = Transcript(request)
        state = self._first_state()
        for attempt_idx in itertools.count():
            num_before = transcript.num_tokens
            trip, route = await self._wait_route(request, state, num_replayed=num_before, end_s=end_s)
            sequence = transcript.plan_sequence(attempt=attempt_idx, prefill_address=route.prefill_address)
            terms = self._terms(request, trip, route, end_s=end_s)
            try:
                async with open_attempt(
                    sequence, route=route, terms=terms, ledger=self.ledger, links=self._links
                ) as call:
                    while True:
                        batch = await _next_batch(call, transcript)
                        yield batch
                        if batch.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                            return
            except AttemptFailed as error:
                failure = Failure(
                    error=error.error,
                    is_answer=error.is_answer,
                    made_progress=transcript.num_tokens > num_before,
                )
            if ending := transcript.plan_ending():
                yield ending
                return
            state = await self._plan_next(state, failure, route=route, request=request)

    async def _plan_next(
        self, state: RetryState, failure: Failure, *, route: Route, request: AdmittedRequest
    ) -> RetryState:
        """The state to go on with, after the pause that it asks for; raises where there is no going on."""
        now_s = asyncio.get_running_loop().time()
        state, action = plan_retry(state, failure, route=route, view=self._roster.view, now_s=now_s)
        if isinstance(action, GiveUp):
            raise action.error
        self._metrics.counter("replays_total").inc()
        _log.warning(
            "request %s: replays after %s on %s (prefill %s): %s",
            request.request_id,
            type(failure.error).__name__,
            route.decode.key,
            route.prefill.key,
            failure.error.message,
        )
        if action.delay_s:
            await self._roster.wait_change(action.delay_s)
        return state

    async def _wait_route(
        self, request: AdmittedRequest, state: RetryState, *, num_replayed: int, end_s: float | None
    ) -> tuple[Trip, Route]:
        loop = asyncio.get_running_loop()
        left_s = self._limits.ready_wait_s
        if end_s is not None:
            left_s = min(left_s, max(end_s - loop.time(), 0.0))
        try:
            view = await self._roster.wait_ready(left_s)
        except NotReady:
            if end_s is not None and loop.time() >= end_s:
                raise DeadlinePassed("the deadline passed while the cluster was not ready") from None
            raise
        trip = self._affinity.plan(request, view, num_replayed=num_replayed)
        route = plan_route(view, self.ledger.loads, demand=trip.demand, avoid=state.avoid)
        if route is None:
            raise NotReady(f"the cluster waits for {view.waiting_for or 'attention workers'}")
        return trip, route

    def _first_state(self) -> RetryState:
        return RetryState(
            num_replays_left=self._limits.num_replays,
            patience_s=self._limits.ready_wait_s,
            progress_s=asyncio.get_running_loop().time(),
        )

    def _terms(self, request: AdmittedRequest, trip: Trip, route: Route, *, end_s: float | None) -> CallTerms:
        self._affinity.depart(trip, route)
        return CallTerms(
            handshake=Handshake(model=request.model, page_tokens=trip.demand.page_tokens),
            num_tokens=trip.demand.num_tokens - trip.demand.cached(route.prefill),
            num_pages=trip.demand.new_pages(route.decode),
            on_first_token=lambda num_found: self._affinity.arrive(trip, route, num_found=num_found),
            end_s=end_s,
        )


async def _next_batch(attempt: Attempt, transcript: Transcript) -> TokenBatch:
    """The next event that carries something for the client."""
    while True:
        batch = transcript.accept(await attempt.read())
        if not batch.is_empty:
            return batch
