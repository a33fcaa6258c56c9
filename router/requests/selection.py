"""Which prefill and which decode worker take a request: a pure decision over what this router has in flight.

Prefill: the fewest tokens to compute before this prompt is done: those of it that are not cached there, and
those that are queued before it. So a cached prefix draws requests to its worker until the queue there is
longer than what the cache saves; then another worker computes the prefix, and holds it too.

Decode: the most KV pages left, where pages that hold the prompt already need not be found again; then the
fewest requests. Of two with 100 pages, one with 30 reserved and one with 20, the second is picked; but the
first if 11 pages of the prompt are there.

Where workers of both roles prefill for themselves, one order decides: room for the request, then tokens to
compute, with 64 more for every request that decodes there and slows them down. Ties: the lower worker id.

    prompt of 4,096 tokens         tokens cached   queued   requests   order
    worker a                               4,000        0         50    96 + 3,200 = 3,296   <- picked
    worker b                                   0        0          0            4,096
    worker a, 70 requests later            4,000        0        120            7,776
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from router.requests.members import ClusterView, Worker

_TOKENS_A_REQUEST = 64
"""Prompt tokens that weigh as much as a request that decodes on the same worker."""


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
class Demand:
    """What the next attempt of a request asks of its workers."""

    num_tokens: int = 0
    """To prefill: the prompt and what was generated before a replay."""
    num_pages: int = 0
    """KV pages that it may grow to."""
    page_tokens: int = 0
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Of the prompt, by worker key; absent = none."""

    def cached(self, worker: Worker) -> int:
        """Tokens that a worker is believed to hold."""
        return self.cached_tokens.get(worker.key, 0)

    def new_pages(self, worker: Worker) -> int:
        """Pages that the request would add to those that a worker holds."""
        return self.num_pages - (self.cached(worker) // self.page_tokens if self.page_tokens else 0)


NO_DEMAND = Demand()


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one attempt of a request runs."""

    decode: Worker
    prefill: Worker
    """The decode worker itself where it prefills too."""
    reason: str = "cold"
    """Of the prefill worker: "prefix" = it holds the most of the prompt; "load" = another holds more, but is
    busier; "cold" = none holds any of it."""

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


def plan_route(
    view: ClusterView,
    loads: Mapping[str, Load],
    *,
    demand: Demand = NO_DEMAND,
    avoid: Collection[str] = (),
) -> Route | None:
    """The workers that take the next attempt, or None where the view has none.

    Args:
        view: the newest cluster view.
        loads: what is in flight, by worker key; a key that is absent is idle.
        demand: what the attempt asks for.
        avoid: keys of workers that failed this request; taken only where there is no other.
    """
    decoders = _preferred(view.decode, avoid)
    prefillers = _preferred(view.prefill, avoid)
    if not decoders or not prefillers:
        return None
    is_apart = any(not worker.can_decode for worker in prefillers)
    order = _decode_order if is_apart else _whole_order
    decode = min(decoders, key=lambda worker: order(worker, loads.get(worker.key, IDLE), demand))
    prefill = decode
    if is_apart or not decode.can_prefill:
        prefill = min(
            prefillers, key=lambda worker: _prefill_order(worker, loads.get(worker.key, IDLE), demand)
        )
    return Route(decode=decode, prefill=prefill, reason=_reason(prefill, prefillers, demand))


def has_alternative(view: ClusterView, avoid: Collection[str]) -> bool:
    """Whether a route exists that touches none of the workers to avoid."""
    return any(worker.key not in avoid for worker in view.decode) and any(
        worker.key not in avoid for worker in view.prefill
    )


def _preferred(workers: tuple[Worker, ...], avoid: Collection[str]) -> tuple[Worker, ...]:
    return tuple(worker for worker in workers if worker.key not in avoid) or workers


def _reason(prefill: Worker, prefillers: tuple[Worker, ...], demand: Demand) -> str:
    most = max(demand.cached(worker) for worker in prefillers)
    if not most:
        return "cold"
    return "prefix" if demand.cached(prefill) == most else "load"


def _decode_order(worker: Worker, load: Load, demand: Demand) -> tuple[int, int, str]:
    num_left = worker.num_pages - load.reserved_pages - demand.new_pages(worker)
    return (-num_left, load.num_requests, worker.key)


def _prefill_order(worker: Worker, load: Load, demand: Demand) -> tuple[int, bool, int, str]:
    num_tokens = demand.num_tokens - demand.cached(worker) + load.queued_prompt_tokens
    return (num_tokens, worker.can_decode, load.num_requests, worker.key)


def _whole_order(worker: Worker, load: Load, demand: Demand) -> tuple[bool, int, int, str]:
    """Of a worker that prefills for itself; where it cannot, another one computes the whole prompt for it."""
    num_left = worker.num_pages - load.reserved_pages - demand.new_pages(worker)
    num_cached = demand.cached(worker) if worker.can_prefill else 0
    num_tokens = demand.num_tokens - num_cached + load.queued_prompt_tokens
    return (num_left < 0, num_tokens + _TOKENS_A_REQUEST * load.num_requests, -num_left, worker.key)
