"""The gate before the queue: refuses what would wait too long, at once and before any work.

How long the queue lasts is learnt from how it moved since it was empty last (`wire.pace`): seconds a token,
prompt and wanted tokens together.
"""

import threading
from dataclasses import dataclass

from wire.errors import Overloaded
from wire.pace import QueuePace

_MIN_RETRY_S = 1.0


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
        self._pace = QueuePace()

    def enter(self, num_tokens: int, *, now_s: float) -> Overloaded | None:
        """The refusal of one more request of so many tokens; None = it is in the queue."""
        with self._lock:
            wait_s = self._pace.wait_s(self._num_tokens)
            if self._num_requests >= self._limits.max_requests or wait_s > self._limits.max_wait_s:
                return self._refusal(wait_s)
            if not self._num_requests:
                self._pace.begin(now_s=now_s)
            self._num_requests += 1
            self._num_tokens += num_tokens
        return None

    def leave(self, num_tokens: int, *, now_s: float, is_served: bool) -> None:
        """A request left the queue; only those that were served tell of its pace."""
        with self._lock:
            self._num_requests -= 1
            self._num_tokens -= num_tokens
            if is_served:
                self._pace.observe(num_tokens, now_s=now_s)
            if not self._num_requests:
                self._pace.forget()

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        with self._lock:
            return self._num_requests == self._num_tokens == 0

    def _refusal(self, wait_s: float) -> Overloaded:
        limits = self._limits
        retry_s = min(max(wait_s, _MIN_RETRY_S), max(limits.max_wait_s, _MIN_RETRY_S))
        message = (
            f"{self._num_requests} requests wait here, about {wait_s:.1f} s; wanted at most "
            f"{limits.max_requests} and {limits.max_wait_s:g} s; try again in {retry_s:.1f} s"
        )
        return Overloaded(message, retry_after_s=retry_s)
