"""Ending a process of Ray's, and no other."""

import signal
import subprocess
import sys

import pytest

from cluster.launcher import kill_ray_process

WAITING = "import sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"


def start(title: str) -> "subprocess.Popen[bytes]":
    """A process that shows another name than its program's, as Ray's workers do."""
    process = subprocess.Popen(
        [title, "-c", WAITING], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(2) == b"up"
    return process


@pytest.mark.parametrize("is_stopped", [False, True])
def test_rays_process_ends_even_when_it_is_stopped(is_stopped: bool) -> None:
    with start("ray::WorkerActor") as process:
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
        kill_ray_process(process.pid)
        assert process.wait(timeout=20) == -signal.SIGKILL


def test_process_that_is_not_rays_lives_on() -> None:
    with start("somebody") as process:
        kill_ray_process(process.pid)
        process.communicate(b"", timeout=20)
        assert process.returncode == 0


def test_process_that_is_gone_is_no_error() -> None:
    with start("ray::WorkerActor") as process:
        process.communicate(b"", timeout=20)
    kill_ray_process(process.pid)
