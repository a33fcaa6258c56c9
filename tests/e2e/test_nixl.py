"""A cluster whose rows go from prefill to decode workers over NIXL, while its workers are killed."""

import random
import signal
from collections.abc import Callable

import pytest
from e2e_cluster import Running, scrape, wait_until
from e2e_streams import make_load

from tests.e2e.test_attention_failures import MOST_DELAY_S, lose, pages_in_use, pick
from tests.integration.workers.lab import needs_nixl

NUM_KILLS = 3
"""Of each role."""


def frames(running: Running, form: str) -> float:
    """Frames of rows that the prefill workers that are there sent in this form."""
    prefill = [m for name, m in running.shell.members().items() if name.startswith("prefill")]
    name = f'moray_attention_kv_frames_total{{form="{form}"}}'
    return sum(scrape(member["metrics_address"]).get(name, 0.0) for member in prefill)


@pytest.mark.slow
@needs_nixl
def test_killed_and_stopped_workers_change_no_answer_over_nixl(start: Callable[..., Running]) -> None:
    values = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}, "kv": {"transport": "nixl"}}
    running = start(values)
    load = make_load(running.shell.members()["router-0"]["address"], sampled=True)
    expected = load.expected()[0]
    assert frames(running, "nixl") > 0
    assert frames(running, "plain") == 0
    rng = random.Random(0)
    for number in [signal.SIGKILL] * NUM_KILLS + [signal.SIGSTOP]:
        for role in ("decode", "prefill"):
            victim = pick(running, role, rng)
            answers = lose(running, load, expected, victim, rng.uniform(0, MOST_DELAY_S), number)
            assert answers.wrong == []
    assert frames(running, "nixl") > 0
    wait_until(lambda: not pages_in_use(running), what="pages to be free")
