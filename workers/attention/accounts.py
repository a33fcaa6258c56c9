"""What the engine has done for whom, and how fast: the scheduler's memory. Plain numbers; no clock in here.

A token costs more the more it looks back at, for the indexer scores every position before it: with
context_cost_tokens 65,536 a prompt token behind 65,536 others costs 2, the first one 1.
"""

from collections import Counter
from collections.abc import Mapping

_PACE_COST = 32.0
"""Steps below this cost say nothing of the pace of a prompt: their time is that of reading weights."""


def token_cost(num_tokens: int, *, first_position: int, context_cost_tokens: int) -> float:
    """The cost of a chunk: `num_tokens` rows from `first_position` on."""
    return num_tokens * (1 + first_position / context_cost_tokens)


class TenantAccounts:
    """The cost of what was computed for each tenant with open sequences."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._num_open: Counter[str] = Counter()

    @property
    def served(self) -> Mapping[str, float]:
        """Tenant -> cost so far, of those with open sequences."""
        return self._served

    def enter(self, tenant: str) -> None:
        """One more sequence; a tenant that was away starts beside the least served, without credit."""
        if not self._num_open[tenant]:
            self._served[tenant] = min(self._served.values(), default=0.0)
        self._num_open[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One sequence less."""
        self._num_open[tenant] -= 1
        if not self._num_open[tenant]:
            del self._num_open[tenant], self._served[tenant]

    def charge(self, tenant: str, cost: float) -> None:
        """Something was computed for a tenant with open sequences."""
        self._served[tenant] += cost


class Pace:
    """The fastest that prompts were ever computed: what takes longer than this says cannot be had in time."""

    def __init__(self) -> None:
        self.seconds_per_cost = 0.0
        """0 until a prompt was computed."""

    def observe(self, *, cost: float, seconds: float) -> None:
        """A step of this cost took so long."""
        if cost >= _PACE_COST:
            pace = seconds / cost
            self.seconds_per_cost = min(self.seconds_per_cost or pace, pace)
