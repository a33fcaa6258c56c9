"""What this router has in flight on each worker: the account that selection reads.

One lease per attempt of a request; runs on one asyncio loop, no locks.
"""

from dataclasses import dataclass

from router.requests.selection import IDLE, Load, Route
from wire.errors import InternalError


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One attempt's share of two workers."""

    lease_id: int
    decode_key: str
    prefill_key: str
    prompt_tokens: int
    """Queued at the prefill worker until the first new token."""
    num_pages: int
    """Reserved at the decode worker until the end."""


class Ledger:
    """The loads of all workers, kept up lease by lease."""

    def __init__(self) -> None:
        self._next_id = 0
        self._leases: dict[int, Lease] = {}
        self._prefilling: dict[int, Lease] = {}
        self._loads: dict[str, Load] = {}

    @property
    def loads(self) -> dict[str, Load]:
        """A copy of the loads, by worker key; idle workers are absent."""
        return dict(self._loads)

    def open(self, route: Route, *, prompt_tokens: int, num_pages: int) -> Lease:
        """Books an attempt that starts now."""
        lease = Lease(
            lease_id=self._next_id,
            decode_key=route.decode.key,
            prefill_key=route.prefill.key,
            prompt_tokens=prompt_tokens,
            num_pages=num_pages,
        )
        self._next_id += 1
        self._leases[lease.lease_id] = self._prefilling[lease.lease_id] = lease
        self._add(lease.decode_key, pages=num_pages, requests=1)
        self._add(lease.prefill_key, tokens=prompt_tokens)
        return lease

    def end_prefill(self, lease: Lease) -> None:
        """The first new token came back; again for the same lease does nothing."""
        if self._prefilling.pop(lease.lease_id, None):
            self._add(lease.prefill_key, tokens=-lease.prompt_tokens)

    def close(self, lease: Lease) -> None:
        """The attempt is over, however it ended.

        Raises:
            InternalError: the lease was closed before or is not of this ledger.
        """
        if self._leases.get(lease.lease_id) != lease:
            raise InternalError(f"lease {lease.lease_id} is not open; it was closed twice")
        self.end_prefill(lease)
        del self._leases[lease.lease_id]
        self._add(lease.decode_key, pages=-lease.num_pages, requests=-1)

    def check_integrity(self) -> None:
        """Every load is the sum of its open leases, and nothing else is booked.

        Raises:
            InternalError: naming the worker whose account is wrong.
        """
        booked: dict[str, Load] = {}
        for lease in self._leases.values():
            _book(booked, lease.decode_key, pages=lease.num_pages, requests=1)
            _book(booked, lease.prefill_key, tokens=self._queued_by(lease))
        for key in sorted({*booked, *self._loads}):
            wanted, got = booked.get(key, IDLE), self._loads.get(key, IDLE)
            if wanted != got:
                raise InternalError(f"ledger of {key}: open leases sum to {wanted}, booked are {got}")
        if stray := sorted(self._prefilling.keys() - self._leases.keys()):
            raise InternalError(f"ledger: leases {stray} prefill but are not open")

    def _queued_by(self, lease: Lease) -> int:
        return lease.prompt_tokens if lease.lease_id in self._prefilling else 0

    def _add(self, key: str, *, tokens: int = 0, pages: int = 0, requests: int = 0) -> None:
        _book(self._loads, key, tokens=tokens, pages=pages, requests=requests)


def _book(loads: dict[str, Load], key: str, *, tokens: int = 0, pages: int = 0, requests: int = 0) -> None:
    old = loads.get(key, IDLE)
    new = Load(
        queued_prompt_tokens=old.queued_prompt_tokens + tokens,
        reserved_pages=old.reserved_pages + pages,
        num_requests=old.num_requests + requests,
    )
    loads[key] = new
    if new == IDLE:
        del loads[key]
