"""Attention workers and the controller are killed under 16 streams: every answer stays the same."""

import random
import signal
import time
from collections.abc import Callable

import pytest
from e2e_cluster import Running, pid_of, scrape, wait_until
from e2e_streams import Answers, Load, make_load

VICTIMS = ("decode", "prefill", "controller")
NUM_KILLS = 20
"""Of each victim's role, in the long form."""
MOST_DELAY_S = 1.5
"""Until a kill, from the moment at which streams run; longer than an answer takes."""


@pytest.fixture(scope="module")
def pairs(start: Callable[..., Running]) -> Running:
    """Two prefill and two decode workers."""
    return start({"prefill": {"replicas": 2}, "decode": {"replicas": 2}})


@pytest.fixture(scope="module")
def load(pairs: Running) -> Load:
    return make_load(pairs.shell.members()["router-0"]["address"], sampled=True)


@pytest.fixture(scope="module")
def expected(load: Load) -> tuple[list[int], ...]:
    return load.expected()[0]


def pick(running: Running, role: str, rng: random.Random) -> str:
    members = sorted(name for name in running.shell.members() if name.rsplit("-", 1)[0] == role)
    return rng.choice(members)


def lose(
    running: Running,
    load: Load,
    expected: tuple[list[int], ...],
    victim: str,
    delay_s: float,
    number: signal.Signals = signal.SIGKILL,
) -> Answers:
    """Loses a member under streams; returns when another process stands in its place and streams went on."""
    before = running.shell.members()[victim]["incarnation"]
    process = pid_of(running, victim)
    with load.running(expected) as answers:
        wait_until(lambda: answers.num_done >= 2, what="streams to run")
        time.sleep(delay_s)
        process.send_signal(number)

        def is_back() -> bool:
            member = running.shell.members().get(victim, {})
            return bool(member.get("is_ready")) and member["incarnation"] > before

        wait_until(is_back, what=f"{victim} to be replaced", deadline_s=90)
        done = answers.num_done
        wait_until(lambda: answers.num_done >= done + len(load.prompts), what="streams to go on")
    return answers


def pages_in_use(running: Running) -> dict[str, float]:
    """KV pages that attention workers hold, of those that hold any."""
    members = running.shell.members()
    used = {
        name: scrape(member["metrics_address"])['moray_attention_pages{state="used"}']
        for name, member in members.items()
        if member["role"] in ("ROLE_PREFILL", "ROLE_DECODE", "ROLE_BOTH")
    }
    return {name: num_pages for name, num_pages in used.items() if num_pages}


@pytest.mark.parametrize("role", VICTIMS)
def test_killed_member_changes_no_answer_and_leaves_no_page_behind(
    pairs: Running, load: Load, expected: tuple[list[int], ...], role: str
) -> None:
    rng = random.Random(role)
    answers = lose(pairs, load, expected, pick(pairs, role, rng), rng.uniform(0, MOST_DELAY_S))
    assert answers.wrong == []
    wait_until(lambda: not pages_in_use(pairs), what="pages to be free")


def test_stopped_decode_worker_is_replaced_and_changes_no_answer(
    pairs: Running, load: Load, expected: tuple[list[int], ...]
) -> None:
    answers = lose(pairs, load, expected, "decode-0", 0.5, signal.SIGSTOP)
    assert answers.wrong == []
    wait_until(lambda: not pages_in_use(pairs), what="pages to be free")


@pytest.mark.slow
@pytest.mark.parametrize("role", VICTIMS)
def test_twenty_kills_at_random_moments_change_no_answer(
    pairs: Running, load: Load, expected: tuple[list[int], ...], role: str
) -> None:
    rng = random.Random(f"20 of {role}")
    for _ in range(NUM_KILLS):
        answers = lose(pairs, load, expected, pick(pairs, role, rng), rng.uniform(0, MOST_DELAY_S))
        assert answers.wrong == []
    wait_until(lambda: not pages_in_use(pairs), what="pages to be free")
