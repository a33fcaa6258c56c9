"""Which prefill and which decode worker take a request: a pure decision over what this router has in flight.

Prefill: the fewest prompt tokens queued. Decode: the most free KV pages, then the fewest requests. Ties
go to the lower worker id. Of two decode workers with 100 pages, one with 30 reserved and one with 20, the
second is picked.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from router.requests.members import ClusterView, Worker


@dataclass(frozen=True, kw_only=True)
class Load:
    """What this router has in flight on one worker."""

    queued_prompt_tokens: int = 0
    """Prompt tokens sent there whose first new token has not come back."""
    reserved_pages: int = 0
    """KV pages that its requests may grow to."""
    num_requests: int = 0
    """Requests that decode there."""


IDLE = Load()


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one attempt of a request runs."""

    decode: Worker
    prefill: Worker
    """The decode worker itself where it prefills too."""

    @property
    def prefill_address(self) -> str:
        """host:port to pull the prefilled pages from; "" = the decode worker prefills."""
        return "" if self.prefill == self.decode else self.prefill.address


def num_pages_of(num_tokens: int, page_tokens: int) -> int:
    """KV pages that hold `num_tokens`; 0 while the page length is not known.

    >>> num_pages_of(65, 64)
    2
    """
    return -(-num_tokens // page_tokens) if page_tokens else 0


def plan_route(view: ClusterView, loads: Mapping[str, Load], *, avoid: Collection[str] = ()) -> Route | None:
    """The workers that take the next attempt, or None where the view has none.

    Args:
        view: the newest cluster view.
        loads: what is in flight, by worker key; a key that is absent is idle.
        avoid: keys of workers that failed this request; taken only where there is no other.
    """
    decoders = _preferred(view.decode, avoid)
    prefillers = _preferred(view.prefill, avoid)
    if not decoders or not prefillers:
        return None
    decode = min(decoders, key=lambda worker: _decode_order(worker, loads.get(worker.key, IDLE)))
    if decode.can_prefill and not any(not worker.can_decode for worker in prefillers):
        return Route(decode=decode, prefill=decode)
    prefill = min(prefillers, key=lambda worker: _prefill_order(worker, loads.get(worker.key, IDLE)))
    return Route(decode=decode, prefill=prefill)


def has_alternative(view: ClusterView, avoid: Collection[str]) -> bool:
    """Whether a route exists that touches none of the workers to avoid."""
    return any(worker.key not in avoid for worker in view.decode) and any(
        worker.key not in avoid for worker in view.prefill
    )


def _preferred(workers: tuple[Worker, ...], avoid: Collection[str]) -> tuple[Worker, ...]:
    return tuple(worker for worker in workers if worker.key not in avoid) or workers


def _decode_order(worker: Worker, load: Load) -> tuple[int, int, str]:
    return (load.reserved_pages - worker.num_pages, load.num_requests, worker.key)


def _prefill_order(worker: Worker, load: Load) -> tuple[int, bool, int, str]:
    return (load.queued_prompt_tokens, worker.can_decode, load.num_requests, worker.key)
