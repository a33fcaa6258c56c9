"""Thousands of short requests through 64 connections: none is lost, no memory and no page stays behind."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from e2e_cluster import Running, end, pid_of
from e2e_pages import wait_no_page_is_used
from mixed_requests import MixedRequest, answers_alone, make_mixed, options_of

from benchmarks._one_process import one_process
from cluster.client import InferenceClient

NUM_CONNECTIONS = 64
NUM_DRAWN = 120
LONGEST_TOKENS = 24
MOST_NEW_TOKENS = 12
MOST_GROWTH_BYTES = 16 << 20
"""Of a process in the second half: 3 kB of each of 5,000 requests, or what an allocator keeps."""


@dataclass(frozen=True)
class Case:
    """Requests, and what each gets alone."""

    requests: list[MixedRequest]
    alone: list[list[int]]


@dataclass
class Tally:
    """What became of the requests; one loop writes it."""

    num_right: int = 0
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def cluster(start: Callable[..., Running]) -> Iterator[Running]:
    running = start()
    yield running
    end(running.process)


@pytest.fixture(scope="module")
def case(cluster: Running) -> Case:
    drawn = make_mixed(NUM_DRAWN, seed=3, longest_tokens=LONGEST_TOKENS)
    kept = [r for r in drawn if r.cancel_after_tokens is None and r.max_tokens <= MOST_NEW_TOKENS]
    with one_process(Path(cluster.shell.status()["model"]["path"]), prefix_reuse=False) as engine:
        return Case(kept, answers_alone(engine, kept))


@pytest.mark.parametrize("num", [640, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_is_lost_and_nothing_stays_behind(cluster: Running, case: Case, num: int) -> None:
    warm_up = ask_many(cluster, case, NUM_CONNECTIONS * 2)
    halves, memory = [], [resident_bytes(cluster)]
    for _ in range(2):
        halves.append(ask_many(cluster, case, num // 2))
        memory.append(resident_bytes(cluster))

    assert [*warm_up.wrong, *halves[0].wrong, *halves[1].wrong] == []
    assert [half.num_right for half in halves] == [num // 2, num // 2]
    wait_no_page_is_used(cluster)
    growth = {worker_id: memory[2][worker_id] - memory[1][worker_id] for worker_id in memory[0]}
    assert {name: size for name, size in growth.items() if size > MOST_GROWTH_BYTES} == {}, memory


def resident_bytes(cluster: Running) -> dict[str, int]:
    """Member -> memory of its process."""
    return {name: pid_of(cluster, name).memory_info().rss for name in cluster.shell.members()}


def ask_many(cluster: Running, case: Case, num: int) -> Tally:
    address = cluster.shell.members()["router-0"]["address"]
    return asyncio.run(_ask_many(address, case, num))


async def _ask_many(address: str, case: Case, num: int) -> Tally:
    """Every connection asks one request after another until `num` were asked by all of them."""
    tally, numbers = Tally(), iter(range(num))

    async def keep_asking(client: InferenceClient) -> None:
        for number in numbers:
            idx = number % len(case.requests)
            request = case.requests[idx]
            tokens = await client.tokens(request.prompt, options_of(request))
            if tokens == case.alone[idx]:
                tally.num_right += 1
            else:
                tally.wrong.append(f"request {idx}: {tokens} instead of {case.alone[idx]}")

    async with AsyncExitStack() as stack:
        clients = [InferenceClient(address, has_own_connection=True) for _ in range(NUM_CONNECTIONS)]
        for client in clients:
            await stack.enter_async_context(client)
        await asyncio.gather(*map(keep_asking, clients))
    return tally
