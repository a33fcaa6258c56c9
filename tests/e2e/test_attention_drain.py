"""Attention workers leave under 16 streams, each in its own way: they drain, and no answer changes."""

import signal
from collections.abc import Callable

import pytest
from e2e_cluster import Running, pid_of, wait_until
from e2e_streams import Load, make_load


@pytest.fixture(scope="module", params=[20, 0], ids=["patient", "impatient"])
def pairs(request: pytest.FixtureRequest, start: Callable[..., Running]) -> Running:
    """Two workers of each role, whose requests may finish, or are always replayed elsewhere."""
    group = {"replicas": 2, "drain_s": request.param}
    return start({"prefill": group, "decode": group})


@pytest.fixture(scope="module")
def load(pairs: Running) -> Load:
    return make_load(pairs.shell.members()["router-0"]["address"], sampled=True)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_worker_that_gets_sigterm_drains_and_another_takes_its_place(
    pairs: Running, load: Load, role: str
) -> None:
    expected, _ = load.expected()
    victim = f"{role}-1"
    before = pairs.shell.members()[victim]["incarnation"]
    process = pid_of(pairs, victim)
    with load.running(expected) as answers:
        wait_until(lambda: answers.num_done >= 2, what="streams to run")
        process.send_signal(signal.SIGTERM)

        def is_back() -> bool:
            member = pairs.shell.members()[victim]
            return bool(member["is_ready"]) and member["incarnation"] > before

        wait_until(is_back, what=f"{victim} to be replaced", deadline_s=90)
        done = answers.num_done
        wait_until(lambda: answers.num_done >= done + len(load.prompts), what="streams to go on")
    assert answers.wrong == []


def test_sizes_of_both_roles_shrink_and_grow_under_streams(pairs: Running, load: Load) -> None:
    expected, _ = load.expected()
    with load.running(expected) as answers:
        wait_until(lambda: answers.num_done >= 2, what="streams to run")
        for size in ("1", "2"):
            done = pairs.shell.run("scale", "--prefill", size, "--decode", size)
            assert done.returncode == 0, done.stderr
        num_done = answers.num_done
        wait_until(lambda: answers.num_done >= num_done + len(load.prompts), what="streams to go on")
    assert answers.wrong == []
