"""Who may go to the workers now, who waits in line, who is refused: pure, `now_s` is passed in.

A request holds the KV pages that it may grow to, from its admission to its end. It is admitted when these fit
into what the decode workers have (times an overcommitment: few requests grow as far as they may, and workers
hand pages out as they are needed). Those who do not fit wait: higher priority first, then the tenant that
holds the fewest pages, then who came first. The first in line is never passed over for a smaller one.

How long the line lasts is learnt from how it moved since it was empty last (`wire.pace`): seconds a page.
What would wait longer than allowed, or than its deadline, is refused at once.

    limit of 8 in line, share 1/2:  tenant a has 4 in line, b has 1   another of a is refused, of b is let in
                                    a has 8, came alone               one of b takes the place of a's newest
"""

from dataclasses import dataclass

from wire.errors import DeadlinePassed, InternalError, MorayError, Overloaded
from wire.pace import QueuePace

_MIN_RETRY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class LineLimits:
    """How much may wait."""

    max_requests: int
    max_wait_s: float
    tenant_share: float
    """Of the line, for one tenant while others wait too."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One request's place."""

    ticket_id: int
    """Grows with every request."""
    tenant: str
    priority: int
    """Higher goes first."""
    num_pages: int
    """KV pages that it may grow to."""
    end_s: float | None
    """When its client's deadline passes."""


@dataclass(frozen=True)
class Refused:
    """Not let in; why, for the count of refusals: full, wait, tenant, deadline or displaced."""

    error: MorayError
    reason: str


@dataclass(frozen=True)
class Entry:
    """What became of a request that came."""

    refused: Refused | None = None
    is_waiting: bool = False
    displaced: tuple[Ticket, Refused] | None = None
    """Another one that lost its place for it."""


class Line:
    """Tickets of the admitted and of the waiting."""

    def __init__(self, limits: LineLimits) -> None:
        self._limits = limits
        self._held: dict[int, Ticket] = {}
        self._waiting: dict[int, Ticket] = {}
        self._held_by_tenant: dict[str, int] = {}
        self.num_held_pages = 0
        """Pages of the admitted."""
        self._pace = QueuePace()

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def enter(self, ticket: Ticket, *, capacity_pages: float, now_s: float) -> Entry:
        """Admits a request, lets it wait, or refuses it."""
        if not self._waiting and self._fits(ticket, capacity_pages):
            self._hold(ticket)
            return Entry()
        wait_s = self._wait_s(ticket)
        if refused := self._too_late(ticket, wait_s, now_s=now_s):
            return Entry(refused)
        displaced = None
        if reason := self._no_place(ticket):
            victim = self._find_victim(ticket) if reason == "full" else None
            if victim is None:
                return Entry(self._refuse(reason, wait_s))
            del self._waiting[victim.ticket_id]
            displaced = victim, self._refuse("displaced", wait_s)
        if not self._waiting:
            self._pace.begin(now_s=now_s)
        self._waiting[ticket.ticket_id] = ticket
        return Entry(is_waiting=True, displaced=displaced)

    def leave(self, ticket: Ticket) -> None:
        """A request ended, or gave up waiting.

        Raises:
            InternalError: it left before.
        """
        if self._held.pop(ticket.ticket_id, None):
            self._book(ticket, -ticket.num_pages)
        elif not self._waiting.pop(ticket.ticket_id, None):
            raise InternalError(f"ticket {ticket.ticket_id} is not in line; it left twice")
        self._forget_pace()

    def admit(self, *, capacity_pages: float, now_s: float) -> list[Ticket]:
        """Those of the waiting whose turn it is now; they hold their pages from here on."""
        admitted = []
        while self._waiting:
            first = min(self._waiting.values(), key=self._order)
            if not self._fits(first, capacity_pages):
                break
            del self._waiting[first.ticket_id]
            self._hold(first)
            admitted.append(first)
            self._pace.observe(first.num_pages, now_s=now_s)
        self._forget_pace()
        return admitted

    def expire(self, ticket: Ticket, *, now_s: float) -> Refused:
        """What a waiting request is told whose time is up; it has to `leave` too."""
        if ticket.end_s is not None and now_s >= ticket.end_s:
            error = DeadlinePassed("the deadline passed while the request waited in this router's line")
            return Refused(error, "deadline")
        return self._refuse("wait", self._limits.max_wait_s)

    def check_integrity(self) -> None:
        """The pages booked are those of the admitted, by tenant too, and nobody is in both places.

        Raises:
            InternalError: what is wrong.
        """
        by_tenant: dict[str, int] = {}
        for ticket in self._held.values():
            by_tenant[ticket.tenant] = by_tenant.get(ticket.tenant, 0) + ticket.num_pages
        booked = {tenant: pages for tenant, pages in self._held_by_tenant.items() if pages}
        wanted = {tenant: pages for tenant, pages in by_tenant.items() if pages}
        if booked != wanted or self.num_held_pages != sum(by_tenant.values()):
            raise InternalError(f"line: tickets hold {wanted}, booked are {booked}")
        if self._held.keys() & self._waiting.keys() or len(self._waiting) > self._limits.max_requests:
            raise InternalError(f"line: {len(self._waiting)} wait, and some are admitted at the same time")

    def _fits(self, ticket: Ticket, capacity_pages: float) -> bool:
        # One that is larger than everything goes alone: the workers say by name what does not fit.
        return not self._held or self.num_held_pages + ticket.num_pages <= capacity_pages

    def _order(self, ticket: Ticket) -> tuple[int, int, int]:
        return (-ticket.priority, self._held_by_tenant.get(ticket.tenant, 0), ticket.ticket_id)

    def _wait_s(self, ticket: Ticket) -> float:
        ahead = [other.num_pages for other in self._waiting.values() if other.priority >= ticket.priority]
        return self._pace.wait_s(sum(ahead) + ticket.num_pages)

    def _too_late(self, ticket: Ticket, wait_s: float, *, now_s: float) -> Refused | None:
        if ticket.end_s is not None and now_s + wait_s >= ticket.end_s:
            left_s = max(ticket.end_s - now_s, 0.0)
            message = f"the request would wait about {wait_s:.1f} s and its deadline passes in {left_s:.1f} s"
            return Refused(DeadlinePassed(f"{message}; give it more time or come back later"), "deadline")
        return self._refuse("wait", wait_s) if wait_s > self._limits.max_wait_s else None

    def _no_place(self, ticket: Ticket) -> str:
        num_own = sum(other.tenant == ticket.tenant for other in self._waiting.values())
        num_allowed = max(1.0, self._limits.tenant_share * self._limits.max_requests)
        if num_own >= num_allowed and num_own < len(self._waiting):
            return "tenant"
        return "full" if len(self._waiting) >= self._limits.max_requests else ""

    def _find_victim(self, ticket: Ticket) -> Ticket | None:
        """The newest in line of the tenant with the most, if that is more than its share; else none."""
        counts: dict[str, int] = {}
        for other in self._waiting.values():
            counts[other.tenant] = counts.get(other.tenant, 0) + 1
        if not counts:
            return None
        most = max(sorted(counts), key=lambda tenant: counts[tenant])
        if most == ticket.tenant or counts[most] <= self._limits.tenant_share * self._limits.max_requests:
            return None
        own = [other for other in self._waiting.values() if other.tenant == most]
        return max(own, key=lambda other: (-other.priority, other.ticket_id))

    def _refuse(self, reason: str, wait_s: float) -> Refused:
        limits = self._limits
        retry_s = min(max(wait_s, _MIN_RETRY_S), max(limits.max_wait_s, _MIN_RETRY_S))
        why = {
            "tenant": f"its tenant has {limits.tenant_share:g} of the line already (router.queue_share)",
            "displaced": "another tenant had none of the line (router.queue_share)",
        }.get(reason, f"wanted at most {limits.max_requests} and {limits.max_wait_s:g} s")
        message = f"{len(self._waiting)} requests wait in this router, about {wait_s:.1f} s; {why}"
        error = Overloaded(f"{message}; try again in {retry_s:.1f} s", retry_after_s=retry_s)
        return Refused(error, reason)

    def _hold(self, ticket: Ticket) -> None:
        self._held[ticket.ticket_id] = ticket
        self._book(ticket, ticket.num_pages)

    def _book(self, ticket: Ticket, num_pages: int) -> None:
        self.num_held_pages += num_pages
        held = self._held_by_tenant.get(ticket.tenant, 0) + num_pages
        self._held_by_tenant[ticket.tenant] = held
        if not held:
            del self._held_by_tenant[ticket.tenant]

    def _forget_pace(self) -> None:
        if not self._waiting:
            self._pace.forget()
