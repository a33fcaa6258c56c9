"""Between sessions and the prefix index: what a request demands, what its route teaches."""

from dataclasses import dataclass

from router.requests.members import ClusterView
from router.requests.prefix_index import Cached, PageChain, PrefixIndex, chain_of
from router.requests.selection import Demand, Route, num_pages_of
from router.requests.types import AdmittedRequest
from wire.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One attempt's demand, and what was believed when its route was chosen."""

    demand: Demand
    chain: PageChain
    cached: dict[str, Cached]
    """By worker key; workers that hold nothing of the prompt are absent."""


class PrefixAffinity:
    """The prefix index and its metrics; everything on one asyncio loop."""

    def __init__(self, *, max_pages: int, metrics: Metrics) -> None:
        self.index = PrefixIndex(max_pages=max_pages)
        self._metrics = metrics

    def plan(self, request: AdmittedRequest, view: ClusterView, *, num_replayed: int) -> Trip:
        """What the next attempt demands of the workers in view, after `num_replayed` new tokens."""
        chain = chain_of(request.prompt_ids, view.page_tokens)
        looked_up = {worker.key: self.index.look_up(worker.key, chain) for worker in view.workers}
        cached = {key: found for key, found in looked_up.items() if found.num_tokens}
        demand = Demand(
            num_tokens=len(request.prompt_ids) + num_replayed,
            num_pages=num_pages_of(len(request.prompt_ids) + request.max_tokens, view.page_tokens),
            page_tokens=view.page_tokens,
            cached_tokens={key: found.num_tokens for key, found in cached.items()},
        )
        return Trip(demand=demand, chain=chain, cached=cached)

    def depart(self, trip: Trip, route: Route) -> None:
        """The attempt goes to its workers: they will hold the prompt."""
        self._metrics.counter("routes_total", reason=route.reason).inc()
        self._metrics.counter("prefix_lookup_tokens_total").inc(trip.demand.num_tokens)
        self._metrics.counter("prefix_hit_tokens_total").inc(trip.demand.cached(route.prefill))
        for worker in {route.prefill.key: route.prefill, route.decode.key: route.decode}.values():
            self.index.learn(worker.key, trip.chain, num_pages=worker.num_pages)

    def arrive(self, trip: Trip, route: Route, *, num_found: int) -> None:
        """The first token came back, and with it the most of the prompt that one of the workers had."""
        for key in dict.fromkeys((route.prefill.key, route.decode.key)):
            expected = trip.cached.get(key, Cached())
            if num_found < expected.num_tokens:
                self._metrics.counter("prefix_corrections_total").inc()
            self.index.correct(key, expected, num_found=num_found)
