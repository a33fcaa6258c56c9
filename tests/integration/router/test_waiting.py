"""Requests that the workers have no room for wait in line, in turn, or are refused before any work."""

import asyncio

import grpc
import pytest

from wire.errors import RETRY_KEY, DeadlinePassed, Overloaded, from_rpc
from wire.proto import control_pb2

PROMPT = (5, 6, 7)
LARGE = 61
"""New tokens that, with the prompt, take 16 pages of 4 tokens; the fake worker has 100."""


def busy(kit):
    return kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(1))


async def fill(lab):
    """Six requests that leave no room for a seventh of their size."""
    calls = [lab.call(PROMPT, max_tokens=LARGE) for _ in range(6)]
    await lab.until(lambda: len(lab["d0"].requests) == 6)
    return [asyncio.create_task(lab.tokens(call)) for call in calls]


async def waiting(lab, num_requests):
    await lab.until(lambda: lab.metric("queued_requests") == num_requests)


async def error_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


def test_request_without_room_waits_until_another_ends(kit):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1) as lab:
            running = await fill(lab)
            late = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE)))
            await waiting(lab, 1)
            assert len(worker.requests) == 6
            worker.release.set()
            assert await late == kit.expected(PROMPT, LARGE)
            await asyncio.gather(*running)
            assert lab.metric("queued_requests") == 0
            assert lab.metric("queue_seconds_count") == 1

    kit.run(main())


def test_higher_priority_goes_first(kit):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1) as lab:
            running = await fill(lab)
            low = asyncio.create_task(lab.tokens(lab.call((8, 9), max_tokens=62)))
            await waiting(lab, 1)
            high = asyncio.create_task(lab.tokens(lab.call((9, 8), max_tokens=62, priority=5)))
            await waiting(lab, 2)
            running.pop().cancel()
            await waiting(lab, 1)
            await lab.until(lambda: len(worker.requests) == 7)
            assert list(worker.requests[-1].token_ids) == [9, 8]
            assert worker.requests[-1].priority == 5
            worker.release.set()
            await asyncio.gather(low, high, *running)

    kit.run(main())


def test_request_beyond_the_line_is_refused_with_a_delay_before_any_work(kit):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1, max_queued_requests=1) as lab:
            running = await fill(lab)
            late = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE)))
            await waiting(lab, 1)
            raised = await error_of(lab.call(PROMPT, max_tokens=LARGE))
            assert raised.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(raised.trailing_metadata())[RETRY_KEY] == "1000"
            assert from_rpc(raised).retry_after_s == 1.0
            assert lab.metric("refused_total", reason="full") == 1
            assert len(worker.requests) == 6
            worker.release.set()
            await asyncio.gather(late, *running)

    kit.run(main())


@pytest.mark.parametrize(
    ("config", "timeout", "kind"), [({"max_wait_s": 0.1}, None, Overloaded), ({}, 0.2, DeadlinePassed)]
)
def test_wait_ends_with_its_time(kit, config, timeout, kind):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1, **config) as lab:
            running = await fill(lab)
            raised = await error_of(lab.call(PROMPT, max_tokens=LARGE, timeout=timeout))
            assert isinstance(from_rpc(raised), kind)
            await waiting(lab, 0)
            worker.release.set()
            await asyncio.gather(*running)

    kit.run(main())


def test_client_that_leaves_the_line_gives_its_place_back(kit):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1, max_queued_requests=1) as lab:
            running = await fill(lab)
            call = lab.call(PROMPT, max_tokens=LARGE)
            await waiting(lab, 1)
            call.cancel()
            await waiting(lab, 0)
            late = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE)))
            await waiting(lab, 1)
            worker.release.set()
            await asyncio.gather(late, *running)

    kit.run(main())


def test_tenant_of_the_metadata_gets_the_place_of_one_who_fills_the_line(kit):
    async def main():
        worker = busy(kit)
        async with kit.open_lab(worker, kv_overcommit=1, max_queued_requests=2) as lab:
            running = await fill(lab)
            first = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE, tenant="a")))
            await waiting(lab, 1)
            second = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE, tenant="a")))
            await waiting(lab, 2)
            request = lab.request(PROMPT, max_tokens=LARGE)
            other = asyncio.create_task(lab.tokens(lab.stub.Generate(request, metadata=(("x-tenant", "b"),))))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second
            assert "queue_share" in caught.value.details()
            worker.release.set()
            await asyncio.gather(first, other, *running)
            assert {request.tenant for request in worker.requests} == {"", "a", "b"}
            assert lab.metric("refused_total", reason="displaced") == 1

    kit.run(main())


def test_another_worker_makes_room(kit):
    async def main():
        worker, second = busy(kit), kit.worker("d1", control_pb2.ROLE_BOTH)
        async with kit.open_lab(worker, second, push=False, kv_overcommit=1) as lab:
            lab.push(without=("d1",))
            running = await fill(lab)
            late = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=LARGE)))
            await waiting(lab, 1)
            lab.push()
            assert await late == kit.expected(PROMPT, LARGE)
            assert len(second.requests) == 1
            worker.release.set()
            await asyncio.gather(*running)

    kit.run(main())


def test_delay_of_workers_that_are_all_full_reaches_the_client(kit):
    async def main():
        full = Overloaded("no room", retry_after_s=2.5)
        workers = [
            kit.worker(name, control_pb2.ROLE_BOTH, script=kit.abort_after(0, full)) for name in ("d0", "d1")
        ]
        async with kit.open_lab(*workers) as lab:
            raised = await error_of(lab.call(PROMPT, max_tokens=3))
            assert from_rpc(raised).retry_after_s == 2.5
            assert [len(worker.requests) for worker in workers] == [1, 1]

    kit.run(main())
