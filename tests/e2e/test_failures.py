"""Expert workers are lost in every way under 16 streams: no request fails and every answer stays the same."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
from e2e_cluster import Running, pid_of, scrape, wait_until
from e2e_streams import Answers, Load, make_load

EXPERTS = ("expert-0", "expert-1", "expert-2")
MOST_PAUSE_S = 2.0
"""What the loss of a worker may add to the longest gap of an undisturbed run."""


COPIES = {"expert": {"replicas": 3, "num_slots": 12}}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"expert": {"replicas": 3}}, id="single-copies"),
        pytest.param(COPIES, id="copies"),
        pytest.param(COPIES | {"dispatch": {"transport": "torch"}}, id="torch", marks=pytest.mark.slow),
    ],
)
def three(request: pytest.FixtureRequest, start: Callable[..., Running]) -> Running:
    """Three expert workers: each expert in one place, most in two, or so over torch.distributed."""
    return start(request.param)


@pytest.fixture(scope="module")
def load(three: Running) -> Load:
    return make_load(three.shell.members()["router-0"]["address"])


@pytest.fixture(scope="module")
def expected(load: Load) -> tuple[tuple[list[int], ...], Answers]:
    return load.expected()


def incarnations(running: Running) -> dict[str, Any]:
    members = running.shell.members()
    return {name: members[name]["incarnation"] for name in EXPERTS if members[name]["is_ready"]}


def rows_of(running: Running, worker_id: str) -> float:
    samples = scrape(running.shell.members()[worker_id]["metrics_address"])
    return sum(value for name, value in samples.items() if name.startswith("moray_expert_rows_total"))


def lose(
    running: Running, load: Load, expected: tuple[list[int], ...], victims: Sequence[str], number: int
) -> Answers:
    """Sends a signal to some expert workers under load; returns when they are replaced and work again."""
    before = incarnations(running)
    processes = [pid_of(running, victim) for victim in victims]
    with load.running(expected) as answers:
        wait_until(lambda: answers.num_done >= 2, what="streams to run")
        for process in processes:
            process.send_signal(number)

        def are_back() -> bool:
            now = incarnations(running)
            return all(now.get(victim, 0) > before[victim] for victim in victims)

        wait_until(are_back, what=f"{victims} to be replaced", deadline_s=90)
        for victim in victims:
            wait_until(lambda victim=victim: rows_of(running, victim) > 0, what=f"{victim} to get rows")
        done = answers.num_done
        wait_until(lambda: answers.num_done >= done + 2, what="streams to go on")
    for process in processes:
        if process.is_running() and process.status() == psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGCONT)
    return answers


@pytest.mark.parametrize(
    ("victims", "number"),
    [
        (EXPERTS[:1], signal.SIGKILL),
        (EXPERTS[1:], signal.SIGKILL),
        (EXPERTS[2:], signal.SIGSTOP),
    ],
    ids=["one-killed", "two-killed", "one-stopped"],
)
def test_lost_expert_workers_change_nothing(
    three: Running,
    load: Load,
    expected: tuple[tuple[list[int], ...], Answers],
    victims: Sequence[str],
    number: signal.Signals,
) -> None:
    answers = lose(three, load, expected[0], victims, number)
    assert answers.wrong == []


@pytest.mark.slow
def test_twenty_kills_in_a_row_change_nothing_and_pause_nobody(
    three: Running, load: Load, expected: tuple[tuple[list[int], ...], Answers]
) -> None:
    found, undisturbed = expected
    gaps_s = []
    for turn in range(20):
        time.sleep(0.37 * (turn % 5))
        answers = lose(three, load, found, [EXPERTS[turn % 3]], signal.SIGKILL)
        assert answers.wrong == []
        gaps_s.append(answers.longest_gap_s)
    assert max(gaps_s) <= undisturbed.longest_gap_s + MOST_PAUSE_S, gaps_s
