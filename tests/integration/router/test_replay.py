"""Workers that die, refuse or damage: the client's stream goes on, token for token."""

import asyncio

import grpc
import pytest

from wire.errors import (
    ExpertNotLoaded,
    FrameInvalid,
    HandshakeRefused,
    InternalError,
    NotReady,
    Overloaded,
    StaleTable,
    WorkerLost,
    from_rpc,
)
from wire.proto import attention_pb2, common_pb2, control_pb2

PROMPT = (5, 6, 7)


@pytest.mark.parametrize("num_before", [0, 1, 5, 11])
def test_worker_that_dies_mid_stream_costs_no_token(kit, num_before):
    async def main():
        first, second = kit.both("d0", kit.hang_after(num_before)), kit.both("d1")
        async with kit.open_lab(first, second) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=12)))
            await first.is_hanging.wait()
            await lab.delivered(num_before)
            await first.stop()
            assert await stream == kit.expected(PROMPT, 12)
            (again,) = second.requests
            assert again.attempt == 1
            assert list(again.token_ids) == [*PROMPT, *kit.expected(PROMPT, num_before)]
            assert again.prompt_tokens == len(PROMPT)
            assert again.max_tokens == 12 - num_before
            assert again.sampling == first.requests[0].sampling
            assert again.request_id == first.requests[0].request_id
            assert lab.metric("replays_total") == 1
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_worker_that_dies_after_its_last_token_needs_no_replay(kit):
    async def main():
        first, second = kit.both("d0", kit.hang_after(4)), kit.both("d1")
        async with kit.open_lab(first, second) as lab:
            call = lab.call(PROMPT, max_tokens=4)
            await first.is_hanging.wait()
            await lab.delivered(4)
            await first.stop()
            responses = [response async for response in call]
            assert [t for response in responses for t in response.token_ids] == kit.expected(PROMPT, 4)
            assert responses[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert second.requests == []

    kit.run(main())


def test_worker_that_leaves_the_cluster_is_left_at_once(kit):
    async def main():
        first, second = kit.both("d0", kit.hang_after(3)), kit.both("d1")
        async with kit.open_lab(first, second) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=9)))
            await first.is_hanging.wait()
            lab.push(without=("d0",))
            assert await stream == kit.expected(PROMPT, 9)
            await asyncio.wait_for(first.is_cancelled.wait(), 5)

    kit.run(main())


def test_the_only_worker_comes_back_as_another_process(kit):
    async def main():
        worker = kit.both("d0", kit.hang_after(3))
        async with kit.open_lab(worker) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=9)))
            await worker.is_hanging.wait()
            await worker.stop()
            lab.push(not_ready=("d0",))
            await lab.pushed()
            reborn = kit.both("d0")
            reborn.incarnation = 2
            await reborn.start()
            lab.workers["d0"] = reborn
            lab.push()
            assert await stream == kit.expected(PROMPT, 9)
            assert lab.metric("replays_total") >= 1

    kit.run(main())


def test_refused_connections_of_the_only_worker_do_not_use_the_replays_up(kit):
    async def main():
        worker = kit.both("d0", kit.hang_after(3))
        async with kit.open_lab(worker, num_replays=1) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=9)))
            await worker.is_hanging.wait()
            await worker.stop()
            # The controller has not noticed yet: the snapshot still names the dead process.
            await lab.until(lambda: lab.metric("replays_total") >= 3)
            reborn = kit.both("d0")
            reborn.incarnation = 2
            await reborn.start()
            lab.workers["d0"] = reborn
            lab.push()
            assert await stream == kit.expected(PROMPT, 9)

    kit.run(main())


@pytest.mark.parametrize("kind", [WorkerLost, StaleTable, ExpertNotLoaded, FrameInvalid, NotReady])
def test_error_of_a_worker_that_another_attempt_mends_is_not_seen(kit, kind):
    async def main():
        worker = kit.both("d0", kit.abort_after(2, kind("a test says so"), times=1))
        async with kit.open_lab(worker) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=8)) == kit.expected(PROMPT, 8)
            assert [request.attempt for request in worker.requests] == [0, 1]

    kit.run(main())


@pytest.mark.parametrize("kind", [HandshakeRefused, InternalError])
def test_error_that_no_attempt_mends_reaches_the_client(kit, kind):
    async def main():
        workers = [kit.both(name, kit.abort_after(2, kind("a test says so"))) for name in ("d0", "d1")]
        async with kit.open_lab(*workers) as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(PROMPT, max_tokens=8))
            error = from_rpc(caught.value)
            assert type(error) is kind
            assert error.message == "a test says so"
            assert sum(len(worker.requests) for worker in workers) == 1

    kit.run(main())


def test_replays_end(kit):
    async def main():
        workers = [kit.both(f"d{idx}", kit.abort_after(1, WorkerLost("again"))) for idx in range(5)]
        async with kit.open_lab(*workers, num_replays=2) as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(PROMPT, max_tokens=8))
            assert isinstance(from_rpc(caught.value), WorkerLost)
            assert sum(len(worker.requests) for worker in workers) == 3
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_overloaded_worker_is_passed_over(kit):
    async def main():
        full = kit.both("d0", kit.abort_after(0, Overloaded("no pages")))
        async with kit.open_lab(full, kit.both("d1")) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=8)) == kit.expected(PROMPT, 8)
            assert len(full.requests) == 1

    kit.run(main())


def test_overload_of_every_worker_reaches_the_client(kit):
    async def main():
        workers = [kit.both(name, kit.abort_after(0, Overloaded("no pages"))) for name in ("d0", "d1")]
        async with kit.open_lab(*workers) as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(PROMPT, max_tokens=8))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert [len(worker.requests) for worker in workers] == [1, 1]

    kit.run(main())


def test_prefill_worker_that_fails_is_replaced_and_the_decode_worker_kept(kit):
    async def main():
        decode = kit.worker("d0", script=kit.abort_after(0, WorkerLost("prefill is gone"), times=1))
        prefills = [kit.worker(name, control_pb2.ROLE_PREFILL) for name in ("p0", "p1")]
        async with kit.open_lab(decode, *prefills) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=8)) == kit.expected(PROMPT, 8)
            addresses = [request.prefill_address for request in decode.requests]
            assert addresses == [prefills[0].address, prefills[1].address]

    kit.run(main())


def test_full_prefill_worker_is_passed_over_and_the_decode_worker_kept(kit):
    async def main():
        full = Overloaded("no pages", field="prefill_address")
        decode = kit.worker("d0", script=kit.abort_after(0, full, times=1))
        prefills = [kit.worker(name, control_pb2.ROLE_PREFILL) for name in ("p0", "p1")]
        async with kit.open_lab(decode, *prefills) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=8)) == kit.expected(PROMPT, 8)
            addresses = [request.prefill_address for request in decode.requests]
            assert addresses == [prefills[0].address, prefills[1].address]

    kit.run(main())


@pytest.mark.parametrize("num_read", [0, 2, 5])
def test_worker_that_dies_while_no_client_listens_costs_no_token(kit, num_read):
    async def main():
        first, second = kit.both("d0", kit.hang_after(5)), kit.both("d1", kit.hang_after(2))
        async with kit.open_lab(first, second) as lab:
            call = lab.call(PROMPT, max_tokens=12, request_id="r", priority=3, tenant="t")
            await lab.delivered(5)
            call.cancel()
            await lab.until(lambda: lab.metric("requests_total", code="CANCELLED") == 1)
            await first.stop()
            await second.is_hanging.wait()
            again = lab.call(
                PROMPT, max_tokens=12, request_id="r", resume_from=num_read, priority=3, tenant="t"
            )
            second.release.set()
            ids = []
            async for response in again:
                assert response.first_idx == num_read + len(ids)
                ids.extend(response.token_ids)
            assert ids == kit.expected(PROMPT, 12)[num_read:]
            (replay,) = second.requests
            assert (replay.attempt, replay.priority, replay.tenant) == (1, 3, "t")
            assert replay.sampling == first.requests[0].sampling

    kit.run(main())


async def _end_without_mark(worker, request, context):
    worker.is_hanging.set()


async def _send_too_many(worker, request, context):
    await context.write(attention_pb2.SequenceEvent(token_ids=[3] * (request.max_tokens + 1)))


def test_stream_that_ends_without_an_end_mark_is_replayed(kit):
    async def main():
        async with kit.open_lab(kit.both("d0", _end_without_mark), kit.both("d1")) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=3)) == kit.expected(PROMPT, 3)

    kit.run(main())


def test_worker_that_sends_too_many_tokens_is_an_internal_error(kit):
    async def main():
        async with kit.open_lab(kit.both("d0", _send_too_many)) as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(PROMPT, max_tokens=3))
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_cancel_while_waiting_for_a_lost_worker_ends_the_request(kit):
    async def main():
        worker = kit.both("d0", kit.hang_after(3))
        async with kit.open_lab(worker) as lab:
            call = lab.call(PROMPT, max_tokens=9)
            await worker.is_hanging.wait()
            await worker.stop()
            lab.push(without=("d0",))
            await lab.pushed()
            call.cancel()
            await lab.idle()
            assert lab.service.ledger.loads == {}

    kit.run(main())


@pytest.mark.parametrize("request_id", ["", "mine"])
@pytest.mark.parametrize("num_told", [0, 1, 2])
def test_log_probabilities_are_told_once_when_the_worker_dies_on_the_way(kit, num_told, request_id):
    """The first worker tells of some tokens of the prompt and breaks; the second tells of all again."""
    told = [common_pb2.TokenLogprobs(logprob=-value) for value in (1.0, 2.0)]

    async def breaks(worker, request, context):
        for one in told[:num_told]:
            await context.write(attention_pb2.SequenceEvent(prompt_logprobs=[one]))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def tells_all(worker, request, context):
        await context.write(attention_pb2.SequenceEvent(prompt_logprobs=told))
        end = common_pb2.FINISH_REASON_LENGTH
        event = attention_pb2.SequenceEvent(token_ids=[8, 9], logprobs=told[::-1], finish_reason=end)
        await context.write(event)

    async def main():
        async with kit.open_lab(kit.both("d0", breaks), kit.both("d1", tells_all)) as lab:
            sampling = common_pb2.SamplingParams(logprobs=0, prompt_logprobs=0)
            call = lab.call(PROMPT, max_tokens=2, sampling=sampling, request_id=request_id)
            responses = [response async for response in call]
            of_prompt = [one for response in responses for one in response.prompt_logprobs]
            assert of_prompt == [common_pb2.TokenLogprobs(), *told]
            assert [one for response in responses for one in response.logprobs] == told[::-1]
            assert [token_id for response in responses for token_id in response.token_ids] == [8, 9]

    kit.run(main())
