"""Attention workers change their roles under 16 streams, and no answer changes."""

from collections.abc import Callable

import pytest
from e2e_cluster import Running, scrape, wait_until
from e2e_streams import Load, make_load

CHANGES = [
    ("decode-1", "prefill"),
    ("prefill-1", "decode"),
    ("decode-1", "both"),
    ("prefill-0", "both"),
    ("prefill-1", "prefill"),
    ("decode-1", "decode"),
    ("prefill-0", "prefill"),
]


@pytest.fixture(scope="module")
def pairs(start: Callable[..., Running]) -> Running:
    """Two prefill and two decode workers."""
    return start({"prefill": {"replicas": 2}, "decode": {"replicas": 2}})


@pytest.fixture(scope="module")
def load(pairs: Running) -> Load:
    return make_load(pairs.shell.members()["router-0"]["address"], sampled=True)


def decoded_tokens(running: Running, worker_id: str) -> float:
    samples = scrape(running.shell.members()[worker_id]["metrics_address"])
    return samples.get('moray_attention_tokens_total{phase="decode"}', 0.0)


def test_roles_change_under_streams_and_no_answer_does(pairs: Running, load: Load) -> None:
    expected, _ = load.expected()
    assert decoded_tokens(pairs, "prefill-1") == 0
    with load.running(expected) as answers:
        for worker_id, role in CHANGES:
            done = pairs.shell.run("role", worker_id, role)
            assert done.returncode == 0, done.stderr
            assert pairs.shell.members()[worker_id]["role"] == f"ROLE_{role.upper()}"
            num_done = answers.num_done
            wait_until(
                lambda num_done=num_done: answers.num_done >= num_done + len(load.prompts),
                what=f"streams to go on with {worker_id} as {role}",
            )
    assert answers.wrong == []
    assert decoded_tokens(pairs, "prefill-1") > 0


def test_role_without_which_nothing_is_served_is_one_clear_line(pairs: Running) -> None:
    assert pairs.shell.run("role", "decode-1", "prefill").returncode == 0
    done = pairs.shell.run("role", "decode-0", "prefill")
    assert done.returncode == 2
    assert "decode-0" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
