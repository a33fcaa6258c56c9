"""The door of a worker: closed when it leaves, so that nobody comes in, and what is inside ends in order.

A call that is refused or sent away is started again by the router, prompt and tokens so far, on another
worker: nothing is lost and nothing is repeated. Whom the router leaves alone depends on the error: `NotReady`
speaks of the worker that answers, `WorkerLost` before the first token of the prefill worker behind it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from wire.errors import MorayError, NotReady, WorkerLost
from workers.attention.types import Source


class Door:
    """Who is inside; runs on one asyncio loop."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._guests: dict[object, Callable[[], None]] = {}
        """What sends each of them away."""
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_closed = False
        """The worker leaves: nobody comes in any more."""

    @property
    def num_inside(self) -> int:
        """Calls that run."""
        return len(self._guests)

    @contextlib.contextmanager
    def enter(self, source: Source, on_sent_away: Callable[[MorayError], None]) -> Iterator[None]:
        """The stay of one call.

        Args:
            source: what the call is for; decides the error.
            on_sent_away: is given the error that the call must end with.

        Raises:
            NotReady: the worker leaves; for prefills on behalf of another worker WorkerLost.
        """
        error_class = WorkerLost if source is Source.PREFILL_ONLY else NotReady
        error = error_class(f"{self._worker_id} leaves the cluster; another worker takes the request")
        if self.is_closed:
            raise error
        guest = object()
        self._guests[guest] = lambda: on_sent_away(error)
        self._empty.clear()
        try:
            yield
        finally:
            del self._guests[guest]
            if not self._guests:
                self._empty.set()

    def close(self) -> None:
        """Lets nobody in any more."""
        self.is_closed = True

    def send_away(self) -> int:
        """Ends every call inside; how many."""
        for leave in list(self._guests.values()):
            leave()
        return len(self._guests)

    async def wait_empty(self, timeout_s: float) -> bool:
        """Whether the last call ended within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return not self._guests
