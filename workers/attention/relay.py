"""Events of the engine's thread on their way to the asyncio loop: one wake-up for all that have gathered."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from workers.attention.types import Event, Sink


class Taker(Protocol):
    """Where the events of a sequence go; a queue, say."""

    def put_nowait(self, event: Event, /) -> None:
        """Takes one; called on the loop."""


class EventRelay:
    """Delivers to takers of one loop, in order; a step of many sequences wakes the loop once.

    Waking a loop costs a system call and a turn of the interpreter's lock: at 32 sequences more than all
    else that the engine's thread does between two steps.
    """

    def __init__(self, on_event: Callable[[Event], None] = lambda _: None) -> None:
        """Takes who hears of every event, on the loop, before its taker does."""
        self._on_event = on_event
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Taker, Event]] = deque()
        """Written by the engine's thread, emptied by the loop's, both under the lock."""

    def sink(self, taker: Taker) -> Sink:
        """What the engine calls for one sequence; call this on the loop of the taker."""
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            with self._lock:
                is_first = not self._waiting
                self._waiting.append((taker, event))
            if is_first:
                loop.call_soon_threadsafe(self._deliver)

        return put

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for taker, event in waiting:
            self._on_event(event)
            taker.put_nowait(event)
