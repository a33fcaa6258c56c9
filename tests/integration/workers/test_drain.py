"""A worker that leaves: nothing new comes in; what runs finishes or is replayed elsewhere, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from tests.integration.workers.lab import Cluster, drain, open_cluster, run_test, until
from tests.reference_data import goldens
from wire.errors import MorayError, NotReady, WorkerLost, from_rpc

GOLDEN = goldens("default")[2]
TEXT: list[int] = GOLDEN.tensor("greedy").tolist()
LONG = tuple(3 + i % 300 for i in range(400))


async def begin(cluster: Cluster, **fields: Any) -> tuple[Any, list[int]]:
    """What an open call streams, and its first tokens."""
    events = aiter(cluster.open_generate(GOLDEN.prompt, **fields))
    return events, list((await anext(events)).token_ids)


async def read_into(tokens: list[int], events: AsyncIterator[Any]) -> None:
    """Takes what is streamed, up to its end; fails with the error that the worker raised."""
    try:
        async for event in events:
            tokens += event.token_ids
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


def leave(cluster: Cluster, worker_id: str) -> "asyncio.Task[None]":
    return asyncio.create_task(cluster.attention[worker_id].server.drain())


async def is_refused(cluster: Cluster, error_class: type[MorayError]) -> None:
    with pytest.raises(error_class, match="leaves the cluster"):
        await cluster.generate(GOLDEN.prompt, max_tokens=1)


def test_running_request_finishes_while_new_ones_are_refused() -> None:
    async def main() -> None:
        async with open_cluster(attention={"prefill-0": {}, "decode-0": {"drain_s": 60}}) as cluster:
            events, tokens = await begin(cluster, max_tokens=len(TEXT))
            leaving = leave(cluster, "decode-0")
            await until(lambda: bool(cluster.controller.troubles.get("decode-0")))
            await is_refused(cluster, NotReady)
            await read_into(tokens, events)
            await leaving
            assert tokens == TEXT
            assert cluster.metric("decode-0", "drained_total", result="finished") == 1
            await cluster.is_empty("decode-0", "prefill-0")

    run_test(main())


def test_request_that_does_not_finish_in_time_goes_on_elsewhere_where_it_stopped() -> None:
    async def main() -> None:
        workers = {"prefill-0": {}, "decode-0": {"drain_s": 0}, "decode-1": {}}
        async with open_cluster(attention=workers) as cluster:
            whole = await cluster.generate(GOLDEN.prompt, at="decode-1", max_tokens=450)
            events, tokens = await begin(cluster, max_tokens=450)
            leaving = leave(cluster, "decode-0")
            with pytest.raises(NotReady):
                await read_into(tokens, events)
            await leaving
            assert 0 < len(tokens) < 450
            assert tokens == whole[: len(tokens)]
            rest = await cluster.generate(
                (*GOLDEN.prompt, *tokens),
                at="decode-1",
                max_tokens=450 - len(tokens),
                prompt_tokens=len(GOLDEN.prompt),
            )
            assert tokens + rest == whole
            assert cluster.metric("decode-0", "drained_total", result="sent_away") == 1
            await cluster.is_empty("decode-0")

    run_test(main())


def test_prefill_worker_finishes_what_it_sends_and_refuses_the_next() -> None:
    async def main() -> None:
        workers: dict[str, dict[str, Any]] = {
            "prefill-0": {"max_step_tokens": 4, "drain_s": 60},
            "decode-0": {},
            "both-0": {},
        }
        async with open_cluster(attention=workers) as cluster:
            whole = await cluster.generate(LONG, at="both-0", prefill="", max_tokens=4)
            call = cluster.open_generate(LONG, max_tokens=4)
            await until(lambda: cluster.metric("decode-0", "kv_bytes_total", direction="received") > 0)
            leaving = leave(cluster, "prefill-0")
            await until(lambda: cluster.attention["prefill-0"].server._door.is_closed)
            await is_refused(cluster, WorkerLost)
            assert await drain(call) == whole
            await leaving
            await cluster.is_empty("prefill-0")

    run_test(main())
