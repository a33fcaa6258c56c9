"""Processors that expert workers of one host divide among themselves, and the threads that run on them."""

import os
import subprocess
import sys
import threading
import uuid

import pytest

from workers.expert import threads
from workers.expert.threads import ComputeThreads, Processors

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux says where threads run")
HERE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
NUM = len(HERE)
HOLDER = """
import sys
from workers.expert import threads
threads.NAME = sys.argv[1]
held = threads.Processors.take(int(sys.argv[2]))
print(*held.numbers, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> str:
    """A host where no other test's workers hold processors."""
    name = f"test-{uuid.uuid4()}-"
    monkeypatch.setattr(threads, "NAME", name)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return name


def test_the_last_processors_are_taken_first() -> None:
    assert Processors.take(1).numbers == HERE[-1:]


def test_no_two_hold_the_same_and_late_ones_get_none() -> None:
    held = [Processors.take(1) for _ in range(NUM + 1)]
    assert sorted(number for one in held[:NUM] for number in one.numbers) == HERE
    assert held[NUM].numbers == []
    held[0].give_back()
    assert len(Processors.take(1).numbers) == 1


def test_fewer_than_wanted_are_none_and_stay_free() -> None:
    assert Processors.take(NUM + 1).numbers == []
    assert Processors.take(NUM).numbers == HERE


@pytest.mark.skipif(NUM < 2, reason="one processor")
def test_those_that_start_together_look_elsewhere() -> None:
    assert Processors.take(1, first=1).numbers == [HERE[-2]]
    assert Processors.take(1, first=NUM).numbers == HERE[-1:]


def test_worker_that_is_killed_has_given_back(host: str) -> None:
    command = [sys.executable, "-c", HOLDER, host, str(NUM)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert [int(number) for number in holder.stdout.readline().split()] == HERE
    assert Processors.take(1).numbers == []
    holder.kill()
    holder.communicate()
    assert Processors.take(NUM).numbers == HERE


def test_pod_that_shares_its_node_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(os, "cpu_count", lambda: NUM)
    assert Processors.take(1).numbers == []
    monkeypatch.setattr(os, "cpu_count", lambda: NUM + 1)
    assert Processors.take(1).numbers == HERE[-1:]


def _entered(compute: ComputeThreads) -> tuple[list[int], int]:
    """Where a thread runs behind `enter`, and how it is scheduled."""
    found: list[tuple[list[int], int]] = []

    def run() -> None:
        compute.enter()
        found.append((sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_thread_runs_on_the_processors_and_pushes_nobody_aside() -> None:
    compute = ComputeThreads("expert-0", num_threads=1, is_bound=True)
    assert _entered(compute) == (HERE[-1:], os.SCHED_BATCH)
    assert (sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)) == (HERE, os.SCHED_OTHER)
    compute.close()
    assert Processors.take(NUM).numbers == HERE


@pytest.mark.parametrize(("is_bound", "where"), [(True, str(max(HERE, default=0))), (False, "any")])
def test_log_says_where_a_worker_computes(
    is_bound: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=threads.__name__)
    ComputeThreads("expert-0", num_threads=1, is_bound=is_bound)
    assert f"expert-0 computes on processor {where}" in caplog.text


def test_thread_that_is_not_to_be_bound_runs_anywhere() -> None:
    compute = ComputeThreads("expert-0", num_threads=1, is_bound=False)
    assert _entered(compute) == (HERE, os.SCHED_BATCH)


@pytest.mark.parametrize("call", ["sched_setaffinity", "sched_setscheduler"])
def test_thread_that_may_not_choose_computes_all_the_same(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, call, refuse)
    assert _entered(ComputeThreads("expert-0", num_threads=1, is_bound=True))[0] == HERE
    assert "where the system puts it" in caplog.text


@pytest.mark.skipif(NUM < 2, reason="one processor")
@pytest.mark.parametrize(
    ("worker_id", "number"), [("expert-0", -1), ("expert-1", -2), ("expert", -1)], ids=str
)
def test_a_workers_number_says_where_it_looks_first(worker_id: str, number: int) -> None:
    assert ComputeThreads(worker_id, num_threads=1, is_bound=True).processors == [HERE[number]]
