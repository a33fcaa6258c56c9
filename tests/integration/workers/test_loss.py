"""Callers that hang up and workers that go: pages come back, and what can go on goes on unchanged."""

import asyncio
import threading
from typing import Any

import grpc.aio
import pytest

from tests.integration.workers.lab import Cluster, drain, open_cluster, run_test, until
from tests.reference_data import goldens
from wire.errors import DeadlinePassed, InvalidRequest, MorayError, WorkerLost
from wire.proto import attention_pb2, control_pb2
from wire.rpc import SCORE_METHOD

GOLDEN = goldens("default")[2]
LONG = tuple(3 + i % 300 for i in range(400))
SLOW_PREFILL: dict[str, dict[str, Any]] = {"prefill-0": {"max_step_tokens": 1}, "decode-0": {}}


async def first_tokens(call: Any, num_tokens: int = 3) -> list[int]:
    """Reads so many tokens and leaves the call open."""
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += (await call.read()).token_ids
    return tokens


async def rest_of(call: Any) -> list[int]:
    tokens: list[int] = []
    while (event := await call.read()) is not grpc.aio.EOF:
        tokens += event.token_ids
    return tokens


async def whole_text(cluster: Cluster, num_tokens: int) -> list[int]:
    return await cluster.generate(GOLDEN.prompt, max_tokens=num_tokens)


async def has_begun(cluster: Cluster) -> None:
    """A prefill that the decode worker pulls is under way."""
    await until(lambda: cluster.metric("decode-0", "kv_bytes_total", direction="received") > 0)


def test_cancel_while_decoding_frees_the_pages() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            call = cluster.open_generate(GOLDEN.prompt, max_tokens=450)
            await first_tokens(call)
            assert cluster.metric("decode-0", "pages", state="used") > 0
            call.cancel()
            await cluster.is_empty("decode-0", "prefill-0")
            assert cluster.metric("decode-0", "tokens_total", phase="decode") < 449

    run_test(main())


def test_cancel_while_prefilling_frees_the_pages_of_both_workers() -> None:
    async def main() -> None:
        async with open_cluster(attention=SLOW_PREFILL) as cluster:
            call = cluster.open_generate(LONG, max_tokens=9)
            await has_begun(cluster)
            call.cancel()
            await cluster.is_empty("decode-0", "prefill-0")
            assert cluster.metric("prefill-0", "tokens_total", phase="prefill") < len(LONG)
            assert await whole_text(cluster, 16) == GOLDEN.tensor("greedy").tolist()

    run_test(main())


def test_deadline_of_the_client_ends_the_work() -> None:
    async def main() -> None:
        async with open_cluster(attention=SLOW_PREFILL) as cluster:
            with pytest.raises(DeadlinePassed):
                await cluster.generate(LONG, max_tokens=9, timeout=0.1)
            await cluster.is_empty("decode-0", "prefill-0")
            assert cluster.metric("prefill-0", "tokens_total", phase="prefill") < len(LONG)

    run_test(main())


def test_score_that_the_caller_gives_up_leaves_the_worker_alive() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            channel = cluster.channel(cluster.attention["decode-0"])
            score = channel.unary_stream(
                SCORE_METHOD, request_serializer=attention_pb2.ScoreRequest.SerializeToString
            )
            request = attention_pb2.ScoreRequest(token_ids=LONG, chunk_tokens=5)
            calls = [score(request, metadata=cluster.handshake.to_metadata()) for _ in range(3)]
            await until(lambda: cluster.metric("decode-0", "dispatch_rows_total") > 0)
            for call in calls:
                call.cancel()
            assert await whole_text(cluster, 16) == GOLDEN.tensor("greedy").tolist()

    run_test(main())


def test_second_call_of_a_running_request_is_refused_and_the_first_goes_on() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            call = cluster.open_generate(GOLDEN.prompt, max_tokens=100, request_id="same")
            tokens = await first_tokens(call)
            with pytest.raises(InvalidRequest, match="running already") as caught:
                await cluster.generate(GOLDEN.prompt, max_tokens=100, request_id="same")
            assert caught.value.field == "request_id"
            assert len(tokens + await rest_of(call)) == 100

    run_test(main())


@pytest.mark.parametrize("is_told_first", [True, False], ids=["table before stop", "stop before table"])
def test_expert_worker_that_moves_changes_no_token(is_told_first: bool) -> None:
    """Stopped in the middle of a text and started on another port, with the next snapshot."""

    async def main() -> None:
        async with open_cluster(num_experts=2) as cluster:
            expected = await whole_text(cluster, 120)
            call = cluster.open_generate(GOLDEN.prompt, max_tokens=120)
            tokens = await first_tokens(call)
            old = cluster.experts["expert-1"]
            if not is_told_first:
                await old.server.stop(grace_s=0)
            new = await cluster.start_expert("expert-1", range(1, 16, 2))
            assert new.address != old.address
            await cluster.push()
            if is_told_first:
                await old.server.stop(grace_s=0)
            assert tokens + await rest_of(call) == expected
            while (
                cluster.metric("expert-1", "rows_total", phase="decode") == 0
            ):  # it is trusted again after a while
                assert await whole_text(cluster, 120) == expected

    run_test(main())


def test_expert_worker_that_comes_back_at_its_port_needs_no_snapshot() -> None:
    """The table is the same: only the stream broke, and a new one is opened."""

    async def main() -> None:
        async with open_cluster(num_experts=2) as cluster:
            expected = await whole_text(cluster, 60)
            call = cluster.open_generate(GOLDEN.prompt, max_tokens=60)
            tokens = await first_tokens(call)
            old = cluster.experts["expert-1"]
            await old.server.stop(grace_s=0)
            await cluster.channels.pop(old.address).close()
            port = int(old.address.rpartition(":")[2])
            new = await cluster.start_expert("expert-1", range(1, 16, 2), port=port)
            assert new.address == old.address
            assert tokens + await rest_of(call) == expected

    run_test(main())


def test_experts_of_a_lost_worker_go_on_in_another() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=2) as cluster:
            expected = await whole_text(cluster, 120)
            call = cluster.open_generate(GOLDEN.prompt, max_tokens=120)
            tokens = await first_tokens(call)
            await cluster.experts.pop("expert-1").server.stop(grace_s=0)
            await cluster.start_expert("expert-2", range(1, 16, 2))
            await cluster.push()
            assert tokens + await rest_of(call) == expected

    run_test(main())


def test_expert_that_no_slot_holds_is_loaded_on_demand() -> None:
    """The worker has let go of an expert that the table still names."""

    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            worker = cluster.experts["expert-0"]
            await cluster.load(worker, worker.slots[:1])
            assert await whole_text(cluster, 16) == GOLDEN.tensor("greedy").tolist()
            assert cluster.metric("prefill-0", "dispatch_retries_total", reason="ExpertNotLoaded") >= 1
            assert cluster.metric("prefill-0", "dispatch_retries_total", reason="WorkerLost") == 0

    run_test(main())


def test_request_waits_for_the_first_table() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            cluster.controller.push(control_pb2.ClusterSnapshot())
            await cluster.start_attention("both-0")
            call = asyncio.create_task(
                cluster.generate(GOLDEN.prompt, at="both-0", prefill="", max_tokens=16)
            )
            await until(lambda: bool(pages_owned(cluster, "both-0")))
            assert not call.done()
            await cluster.push()
            assert await call == GOLDEN.tensor("greedy").tolist()

    run_test(main())


def pages_owned(cluster: Cluster, worker_id: str) -> tuple[Any, ...]:
    """Who has pages; the gauge is written only after the step, which waits for the table."""
    owners: tuple[Any, ...] = cluster.attention[worker_id].server._engine._pages.owners()
    return owners


@pytest.mark.parametrize("grace_s", [0, 0.2])
def test_prefill_worker_that_stops_is_told_as_a_retry_and_frees_the_pages(grace_s: float) -> None:
    async def main() -> None:
        async with open_cluster(attention=SLOW_PREFILL) as cluster:
            call = asyncio.create_task(cluster.generate(LONG, max_tokens=9))
            await has_begun(cluster)
            await cluster.attention.pop("prefill-0").server.stop(grace_s=grace_s)
            with pytest.raises(MorayError) as caught:
                await call
            assert caught.value.is_retryable, repr(caught.value)
            await cluster.is_empty("decode-0")
            golden_text = await cluster.generate(GOLDEN.prompt, prefill="", max_tokens=16)
            assert golden_text == GOLDEN.tensor("greedy").tolist()

    run_test(main())


def test_prefill_worker_that_is_not_there_is_told_as_a_retry() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            gone = cluster.attention.pop("prefill-0")
            await gone.server.stop(grace_s=0)
            with pytest.raises(WorkerLost) as caught:
                await drain(cluster.open_generate(GOLDEN.prompt, prefill="", prefill_address=gone.address))
            assert caught.value.is_retryable
            await cluster.is_empty("decode-0")

    run_test(main())


def test_decode_worker_that_stops_frees_the_prefill_worker() -> None:
    async def main() -> None:
        async with open_cluster(attention=SLOW_PREFILL) as cluster:
            call = asyncio.create_task(cluster.generate(LONG, max_tokens=9))
            await has_begun(cluster)
            await cluster.attention.pop("decode-0").server.stop(grace_s=0)
            with pytest.raises(MorayError):
                await call
            await cluster.is_empty("prefill-0")
            assert cluster.metric("prefill-0", "tokens_total", phase="prefill") < len(LONG)

    run_test(main())


def test_stopped_workers_leave_no_port_and_no_thread() -> None:
    async def main() -> None:
        before = {thread.name for thread in threading.enumerate()}
        async with open_cluster() as cluster:
            await whole_text(cluster, 4)
            addresses = [w.address for w in (*cluster.experts.values(), *cluster.attention.values())]
            names = {thread.name for thread in threading.enumerate()}
            assert {"engine", "experts-expert-0", "experts-local", "loading_0"} <= names - before
        for address in addresses:
            with pytest.raises(OSError, match=r"Connect call failed|refused"):
                await asyncio.open_connection(*address.split(":"))

    run_test(main())
