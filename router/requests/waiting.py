"""The waiting room: carries out what the line decides, on one asyncio loop."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator

from router.requests.line import Line, Refused, Ticket
from router.requests.roster import Roster
from router.requests.selection import num_pages_of
from router.requests.types import AdmittedRequest
from wire.metrics import Metrics

_PATIENCE = 2
"""Guesses of a wait may be too low by so much: who was let in line is not sent away late for a bit more."""


class WaitingRoom:
    """Sessions enter before their first attempt and stay until their end; a replay does not wait again."""

    def __init__(
        self, line: Line, *, roster: Roster, max_wait_s: float, overcommit: float, metrics: Metrics
    ) -> None:
        self._line = line
        self._roster = roster
        self._max_wait_s = max_wait_s
        self._overcommit = overcommit
        self._metrics = metrics
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._ids = itertools.count()

    @contextlib.asynccontextmanager
    async def stay(self, request: AdmittedRequest, *, end_s: float | None) -> AsyncIterator[None]:
        """From the request's turn to its end.

        Raises:
            Overloaded: the line is too long, or the request waited too long.
            DeadlinePassed: it would wait, or waited, until its deadline.
        """
        page_tokens = self._roster.view.page_tokens
        ticket = Ticket(
            ticket_id=next(self._ids),
            tenant=request.tenant,
            priority=request.priority,
            num_pages=num_pages_of(len(request.prompt_ids) + request.max_tokens, page_tokens),
            end_s=end_s,
        )
        entry = self._line.enter(ticket, capacity_pages=self._capacity_pages(), now_s=_now_s())
        if entry.refused:
            raise self._counted(entry.refused)
        if entry.displaced:
            victim, refused = entry.displaced
            self._turns.pop(victim.ticket_id).set_exception(self._counted(refused))
        if entry.is_waiting:
            await self._wait(ticket)
        try:
            yield
        finally:
            self._line.leave(ticket)
            self.call_next()

    def call_next(self) -> None:
        """Lets in whose turn it is; to be called whenever there may be more room."""
        for ticket in self._line.admit(capacity_pages=self._capacity_pages(), now_s=_now_s()):
            self._turns.pop(ticket.ticket_id).set_result(None)
        self._metrics.gauge("queued_requests").set(self._line.num_waiting)

    def check_integrity(self) -> None:
        """Checks the line.

        Raises:
            InternalError: what is wrong.
        """
        self._line.check_integrity()

    async def _wait(self, ticket: Ticket) -> None:
        """Returns at the ticket's turn; otherwise it is out of the line when this ends."""
        begin_s = _now_s()
        turn = self._turns[ticket.ticket_id] = asyncio.get_running_loop().create_future()
        self._metrics.gauge("queued_requests").set(self._line.num_waiting)
        wait_s = _PATIENCE * self._max_wait_s
        if ticket.end_s is not None:
            wait_s = min(wait_s, ticket.end_s - begin_s)
        try:
            await asyncio.wait([turn], timeout=wait_s)
        except asyncio.CancelledError:
            self._give_up(ticket, turn)
            raise
        if not turn.done():
            refused = self._line.expire(ticket, now_s=_now_s())
            self._give_up(ticket, turn)
            raise self._counted(refused)
        turn.result()
        self._metrics.histogram("queue_seconds").observe(_now_s() - begin_s)

    def _give_up(self, ticket: Ticket, turn: asyncio.Future[None]) -> None:
        self._turns.pop(ticket.ticket_id, None)
        if turn.done() and turn.exception() is not None:
            return  # displaced: it is not in line any more
        self._line.leave(ticket)
        self.call_next()

    def _capacity_pages(self) -> float:
        view = self._roster.view
        # Who comes before the cluster is ready waits for that, elsewhere.
        if not view.is_ready or not view.page_tokens:
            return math.inf
        return self._overcommit * sum(worker.num_pages for worker in view.decode)

    def _counted(self, refused: Refused) -> Exception:
        self._metrics.counter("refused_total", reason=refused.reason).inc()
        return refused.error


def _now_s() -> float:
    return asyncio.get_running_loop().time()
