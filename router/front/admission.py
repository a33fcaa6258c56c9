"""Who may come in: a limit on requests in flight, a door that closes for draining."""

import asyncio
import contextlib
from collections.abc import Iterator

from wire.errors import InternalError, NotReady, Overloaded


class Admission:
    """Counts requests in flight; runs on one asyncio loop."""

    def __init__(self, *, max_active_requests: int) -> None:
        self._max = max_active_requests
        self._tasks: dict[int, asyncio.Task[object]] = {}
        self._followers: dict[int, asyncio.Task[object]] = {}
        self._cut: dict[int, asyncio.Task[object]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_closed = False
        """The router drains or stops; nobody comes in any more."""

    @property
    def num_active(self) -> int:
        """Requests in flight."""
        return len(self._tasks)

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """The stay of one request, in the current task.

        Raises:
            NotReady: the router is closing, or closed while the request was inside.
            Overloaded: the limit is reached.
        """
        if self.is_closed:
            raise _closing()
        if self.num_active >= self._max:
            raise Overloaded(
                f"this router holds {self._max} requests, its limit (router.max_active_requests); "
                "try again in about 1 s, or another router",
                retry_after_s=1.0,
            )
        with self._stay(self._tasks):
            yield

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """The stay of a stream that reads a request which came in by itself; there is no limit on these.

        Raises:
            NotReady: the router closed while the stream was inside.
        """
        with self._stay(self._followers):
            yield

    @contextlib.contextmanager
    def _stay(self, room: dict[int, asyncio.Task[object]]) -> Iterator[None]:
        task = _current_task()
        room[id(task)] = task
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if id(task) not in self._cut:
                raise
            task.uncancel()
            raise _closing() from None
        finally:
            del room[id(task)]
            self._cut.pop(id(task), None)
            if not self._tasks and not self._followers:
                self._idle.set()

    def close(self) -> None:
        """Lets nobody in any more."""
        self.is_closed = True

    def cut_all(self) -> None:
        """Ends every request and every stream inside; their clients see NotReady."""
        for key, task in [*self._tasks.items(), *self._followers.items()]:
            self._cut[key] = task
            task.cancel()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether the last request and the last stream left within `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def _closing() -> NotReady:
    return NotReady("this router is shutting down; try another one")


def _current_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    if task is None:
        raise InternalError("admission was entered outside a task")
    return task
