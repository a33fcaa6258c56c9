"""A running cluster grows, shrinks and moves experts under streams that notice nothing."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from e2e_cluster import Running, end

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
