"""A running cluster grows, shrinks and moves experts under streams that notice nothing."""

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from e2e_cluster import Running, end, pid_of, scrape, wait_until
from e2e_streams import Load, make_load

from cluster.client import rebalance
from wire.phases import PHASES
from wire.proto import control_pb2

PROMPTS = [[11 + idx, 12, 13] for idx in range(4)]
LENGTH = ("--max-tokens", "600")


@pytest.fixture(scope="module")
def elastic(start: Callable[..., Running]) -> Iterator[Running]:
    running = start()
    yield running
    end(running.process)


def order(running: Running, *arguments: str) -> dict[str, Any]:
    done = running.shell.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_sizes_and_places_change_under_streams_and_no_answer_does(elastic: Running) -> None:
    undisturbed = elastic.shell.generate(PROMPTS, *LENGTH)
    with ThreadPoolExecutor(1) as pool:
        answers: Future[list[list[int]]] = pool.submit(elastic.shell.generate, PROMPTS, *LENGTH)
        num_rounds = 0
        while num_rounds == 0 or not answers.done():
            grown = order(elastic, "scale", "--experts", "4")
            assert order(elastic, "rebalance", "--force")["table_version"] >= grown["table_version"]
            order(elastic, "scale", "--experts", "2")
            num_rounds += 1
        assert answers.result() == undisturbed
    status = elastic.shell.status()
    assert status["table"]["worker_ids"] == ["expert-0", "expert-1"]
    assert [m["worker_id"] for m in status["members"] if m["role"] == "ROLE_EXPERT"] == [
        "expert-0",
        "expert-1",
    ]
    assert status["waiting_for"] == ""


@pytest.fixture
def controller(elastic: Running) -> str:
    """Its address, asked for before anything is measured: the command line costs more than a move."""
    address: str = elastic.shell.members()["controller"]["address"]
    return address


def replan(address: str, seed: int) -> int:
    """Moves experts to where made-up loads would have them; how many moved."""
    request = control_pb2.RebalanceRequest(force=True, seed=seed)
    return asyncio.run(rebalance(address, request, deadline_s=60)).num_moved


@pytest.fixture
def load(elastic: Running) -> Load:
    return make_load(elastic.shell.members()["router-0"]["address"])


def test_replans_in_a_row_change_no_answer(controller: str, load: Load) -> None:
    expected, _ = load.expected()
    with load.running(expected) as answers:
        wait_until(lambda: answers.num_done >= 2, what="streams to run")
        assert sum(replan(controller, seed) for seed in range(1, 6)) > 0
        done = answers.num_done
        wait_until(lambda: answers.num_done >= done + 2, what="streams to go on")
    assert answers.wrong == []


@pytest.mark.slow
def test_fifty_replans_in_a_row_slow_nobody_down(controller: str, load: Load) -> None:
    """Five turns of streams alone and of ten re-plans under streams; p99 of the gaps of each kind."""
    expected, _ = load.expected()
    ratios = []
    for turn in range(5):
        with load.running(expected) as alone:
            wait_until(lambda: alone.num_done >= 64, what="streams alone")
        with load.running(expected) as moved:
            num_moved = sum(replan(controller, 1 + 10 * turn + i) for i in range(10))
            wait_until(lambda: moved.num_done >= 64, what="streams beside moves")
        assert alone.wrong == moved.wrong == []
        assert num_moved > 0
        ratios.append(moved.p99_gap_s() / alone.p99_gap_s())
    assert statistics.median(ratios) <= 1.1, ratios


def test_decode_workers_come_and_go_under_streams(elastic: Running) -> None:
    undisturbed = elastic.shell.generate(PROMPTS, *LENGTH)
    order(elastic, "scale", "--decode", "2")
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(elastic.shell.generate, PROMPTS, *LENGTH)
        order(elastic, "scale", "--decode", "1")
        assert answers.result() == undisturbed


def test_size_that_cannot_serve_is_one_clear_line(elastic: Running) -> None:
    done = elastic.shell.run("scale", "--decode", "0")
    assert done.returncode == 2
    assert "decode.replicas" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def rows_of(running: Running, worker_id: str) -> dict[str, float]:
    """Phase -> rows that an expert worker has computed for it."""
    samples = scrape(running.shell.members()[worker_id]["metrics_address"])
    return {phase: samples.get(f'moray_expert_rows_total{{phase="{phase}"}}', 0.0) for phase in PHASES}


@pytest.mark.slow
def test_phases_part_under_streams_and_the_other_one_serves_what_is_lost(
    elastic: Running, start: Callable[..., Running]
) -> None:
    """Two workers with room for every expert: no answer changes when they part, nor when one is killed."""
    expected = elastic.shell.generate(PROMPTS, *LENGTH)
    apart = start(
        {
            "expert": {"replicas": 2, "num_slots": 32},
            "balance": {"placements": "by_phase", "interval_s": 1, "min_rows": 100},
        }
    )
    assert apart.shell.generate(PROMPTS, *LENGTH) == expected
    phases = wait_until(lambda: apart.shell.status()["table"].get("worker_phases"), what="phases to part")
    worker_of = {phase: worker_id for worker_id, phase in phases.items()}
    assert "for prefill" in apart.shell.run("status", COLUMNS="200").stdout
    before = {worker_id: rows_of(apart, worker_id) for worker_id in phases}
    assert apart.shell.generate(PROMPTS, *LENGTH) == expected
    after = {worker_id: rows_of(apart, worker_id) for worker_id in phases}
    for worker_id, phase in phases.items():
        grown = {p for p in PHASES if after[worker_id][p] > before[worker_id][p]}
        assert grown == {phase}
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(apart.shell.generate, PROMPTS, *LENGTH)
        wait_until(
            lambda: rows_of(apart, worker_of["decode"])["decode"] > after[worker_of["decode"]]["decode"],
            what="streams to run",
        )
        pid_of(apart, worker_of["decode"]).kill()
        assert answers.result() == expected
    assert rows_of(apart, worker_of["prefill"])["decode"] > 0
    end(apart.process)
