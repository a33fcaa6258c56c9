"""Where the threads that compute run, on a host that an expert worker shares with its callers and others."""

import logging
import os
import re
import socket
from collections.abc import Sequence
from typing import Self

_log = logging.getLogger(__name__)

NAME = "moray-processor-"
"""Of a processor's socket, before its number."""
_KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Set in every container of a pod."""


class Processors:
    """Processors that no other expert worker of this host takes while this object holds them.

    Each is a socket name in Linux's abstract namespace, so a worker that dies has given them back.
    """

    def __init__(self, held: "dict[int, socket.socket]") -> None:
        self._held = held

    @classmethod
    def take(cls, num: int, *, first: int = 0) -> Self:
        """Takes so many; none where fewer are free, or where others may use the same ones unseen.

        Callers on the same host compute on the first processors, so they are taken from the end.

        Args:
            num: threads that compute, >= 1.
            first: how many others, of as many threads, are thought to have taken theirs.
        """
        held: dict[int, socket.socket] = {}
        usable = _own_processors()
        begin = first * num % len(usable) if usable else 0
        for number in usable[begin:] + usable[:begin]:
            if len(held) == num:
                break
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                name.bind(f"\0{NAME}{number}".encode())
            except OSError:
                name.close()
            else:
                held[number] = name
        found = cls(held)
        if len(held) < num:
            found.give_back()
        return found

    @property
    def numbers(self) -> Sequence[int]:
        """Of those held, ascending."""
        return sorted(self._held)

    def give_back(self) -> None:
        """Holds none any more."""
        while self._held:
            self._held.popitem()[1].close()


class ComputeThreads:
    """What each thread does before it computes for a caller."""

    def __init__(self, worker_id: str, *, num_threads: int, is_bound: bool) -> None:
        """Takes processors, if `ExpertConfig.bind_threads` says so.

        Args:
            worker_id: a number at its end says where it looks first: workers that start together do not meet.
            num_threads: that compute.
            is_bound: whether to take any.
        """
        number = re.search(r"\d+$", worker_id)
        first = int(number[0]) if number else 0
        self._processors = Processors.take(num_threads, first=first) if is_bound else Processors({})
        where = ", ".join(map(str, self.processors)) or "any (expert.bind_threads says when it has its own)"
        _log.info("%s computes on processor %s", worker_id, where)

    @property
    def processors(self) -> Sequence[int]:
        """On which they run; empty = on any."""
        return self._processors.numbers

    def enter(self) -> None:
        """Called by the thread.

        It does not push aside, when a call wakes it, the caller that has others to wake: where they share
        processors, the others would begin a whole computation later. And it stays on processors of its own: a
        kernel lets two of these threads wait for one processor while another is idle for most of a layer.
        """
        try:
            if hasattr(os, "SCHED_BATCH"):
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            if self.processors:
                os.sched_setaffinity(0, self.processors)
        except OSError as error:
            # Forbidden by a sandbox, or a processor was taken from the container since.
            _log.warning("a computing thread runs where the system puts it: %s", error)

    def close(self) -> None:
        """Others may take the processors."""
        self._processors.give_back()


def _own_processors() -> list[int]:
    """Those that this process may use, from the last; none where a pod shares its node's with other pods."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    usable = sorted(os.sched_getaffinity(0), reverse=True)
    is_shared = _KUBERNETES in os.environ and len(usable) == os.cpu_count()
    return [] if is_shared else usable
