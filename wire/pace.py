"""How fast a queue moves, learnt from what left it: the memory of every line in which requests wait.

4 requests of 10 tokens left in 0.5 s each, kept share 1:  2.0 s over 40 tokens; 190 more tokens last 9.5 s
"""

_KEPT_SHARE = 0.95
"""Of the memory, with each one that leaves the queue: the last few dozen count."""
_FEWEST_SERVED = 4
"""Ones that must have left the queue before their pace says anything: workers begin cold."""


class QueuePace:
    """Seconds over amount, tokens or pages, of what left the queue since it was empty last."""

    def __init__(self) -> None:
        self._last_s = 0.0
        """When the queue moved last, or began."""
        self._seconds = 0.0
        self._amount = 0.0
        self._num_served = 0

    def begin(self, *, now_s: float) -> None:
        """The queue was empty, and now somebody waits."""
        self._last_s = now_s

    def observe(self, amount: float, *, now_s: float) -> None:
        """One of this size was served and left the queue."""
        self._seconds = self._seconds * _KEPT_SHARE + now_s - self._last_s
        self._amount = self._amount * _KEPT_SHARE + amount
        self._num_served += 1
        self._last_s = now_s

    def wait_s(self, amount: float) -> float:
        """Seconds that so much in the queue lasts, >= 0; 0 while too few have left it to say."""
        if self._num_served < _FEWEST_SERVED or not self._amount:
            return 0.0
        return amount * self._seconds / self._amount

    def forget(self) -> None:
        """Nobody waits any more."""
        self._seconds = self._amount = 0.0
        self._num_served = 0
