"""SIGTERM in a Ray actor: heard by its asyncio loop, so that it can leave in order."""

import asyncio
import faulthandler
import os
import signal
from collections.abc import Callable

_MOST_BYTES = 65536


class SigtermWatch:
    """Calls back on the loop when the process gets SIGTERM; the process goes on.

    Ray runs the methods of an actor outside the main thread, where Python allows no signal handlers, and a
    handler of its own ends the process at once. `faulthandler` can set one from any thread: it writes a few
    lines to a file, here to a pipe that the loop reads.
    """

    def __init__(self, on_sigterm: Callable[[], None]) -> None:
        """Must be made on the loop that is to hear of it."""
        self._on_sigterm = on_sigterm
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._loop.add_reader(self._reader, self._hear)
        faulthandler.register(signal.SIGTERM, file=self._writer, all_threads=False)

    def close(self) -> None:
        """Restores what SIGTERM did before."""
        faulthandler.unregister(signal.SIGTERM)
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def _hear(self) -> None:
        os.read(self._reader, _MOST_BYTES)
        self._on_sigterm()
