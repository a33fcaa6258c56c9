"""The gate before the queue: refuses what would wait too long, at once and before any work.

How long the queue lasts is learnt from how it moved since it was empty last: seconds a token, prompt and
wanted tokens together, of the few dozen requests that left it last.
"""

import threading
from dataclasses import dataclass

from wire.errors import Overloaded

_KEPT_SHARE = 0.95
"""Of the memory of the pace, with each request that leaves the queue."""
_MIN_RETRY_S = 1.0
_FEWEST_SERVED = 4
"""Requests that must have left the queue before their pace says anything: an engine begins cold."""


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """How much may wait, and what is enough to begin with."""

    max_requests: int
    max_wait_s: float
    lookahead_tokens: int
    """New tokens for which a sequence has pages when it is admitted."""


class Gate:
    """Counts what waits; `enter` is called from any thread, `leave` by the engine's."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._num_requests = 0
        self._num_tokens = 0
        self._last_s = 0.0
        """When the queue moved last, or began."""
        self._seconds = 0.0
        self._tokens_moved = 0.0
        self._num_served = 0

    def enter(self, num_tokens: int, *, now_s: float) -> Overloaded | None:
        """The refusal of one more request of so many tokens; None = it is in the queue."""
        with self._lock:
            wait_s = self._wait_s()
            if self._num_requests >= self._limits.max_requests or wait_s > self._limits.max_wait_s:
                return self._refusal(wait_s)
            if not self._num_requests:
                self._last_s = now_s
            self._num_requests += 1
            self._num_tokens += num_tokens
        return None

    def leave(self, num_tokens: int, *, now_s: float, is_served: bool) -> None:
        """A request left the queue; only those that were served tell of its pace."""
        with self._lock:
            self._num_requests -= 1
            self._num_tokens -= num_tokens
            if is_served:
                self._seconds = self._seconds * _KEPT_SHARE + now_s - self._last_s
                self._tokens_moved = self._tokens_moved * _KEPT_SHARE + num_tokens
                self._num_served += 1
                self._last_s = now_s
            if not self._num_requests:
                self._seconds = self._tokens_moved = 0.0
                self._num_served = 0

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        with self._lock:
            return self._num_requests == self._num_tokens == 0

    def _wait_s(self) -> float:
        if self._num_served < _FEWEST_SERVED or not self._tokens_moved:
            return 0.0
        return self._num_tokens * self._seconds / self._tokens_moved

    def _refusal(self, wait_s: float) -> Overloaded:
        limits = self._limits
        retry_s = min(max(wait_s, _MIN_RETRY_S), max(limits.max_wait_s, _MIN_RETRY_S))
        message = (
            f"{self._num_requests} requests wait here, about {wait_s:.1f} s; wanted at most "
            f"{limits.max_requests} and {limits.max_wait_s:g} s; try again in {retry_s:.1f} s"
        )
        return Overloaded(message, retry_after_s=retry_s)
