"""Heartbeats: when a worker that does not answer counts as lost. A pure decision over answers and misses."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How a worker's last heartbeats went.

    Worked example: with 3 misses allowed, answers "yes, no, no, yes, no, no, no" lose the worker at the
    last one.
    """

    max_misses: int
    """Misses in a row at which it is lost, >= 1."""
    num_missed: int = 0
    """Misses since the last answer."""

    @property
    def is_lost(self) -> bool:
        """Whether it has been silent for too long."""
        return self.num_missed >= self.max_misses

    def after(self, *, answered: bool, was_late: bool = False) -> "Pulse":
        """The pulse after one more heartbeat.

        Args:
            answered: an answer came in time.
            was_late: whoever asked was itself held up for so long that no answer says nothing.
        """
        if was_late and not answered:
            return self
        return replace(self, num_missed=0 if answered else self.num_missed + 1)
