"""Keeps a cluster's process out of its terminal's process group, and from outliving the command.

Ray's own processes share the group of whoever starts them. A signal to the whole group (Ctrl-C, `timeout`, a
shell ending a job) would take Ray down under the cluster before it could stop in order, so the work runs in a
session of its own and hears of signals through its parent, one at a time. When the parent is killed outright
the kernel tells the child, which then stops in order too.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends a cluster."""


def run_in_own_session(work: Callable[[], int]) -> int:
    """Runs `work` in a child process and returns its exit code; SIGTERM is how the child hears of signals.

    Must be called while the process has one thread.
    """
    parent_pid = os.getpid()
    child_pid = os.fork()
    if child_pid == 0:
        os.setsid()
        _ask_for_sigterm_after(parent_pid)
        sys.exit(work())

    def forward(_number: int, _frame: FrameType | None) -> None:
        os.kill(child_pid, signal.SIGTERM)

    for number in SIGNALS:
        signal.signal(number, forward)
    _, status = os.waitpid(child_pid, 0)
    return os.waitstatus_to_exitcode(status)


def _ask_for_sigterm_after(parent_pid: int) -> None:
    """Linux sends SIGTERM when the parent dies; elsewhere only the parent's own signals are forwarded."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)
