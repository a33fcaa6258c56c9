"""Requests with an id of their client's own: joined, resumed, kept, cancelled; no token twice or lost."""

import asyncio

import grpc
import pytest

from cluster.client import GenerateOptions, InferenceClient
from router.config import RouterConfig
from router.front.service import RouterService
from wire.errors import DeadlinePassed, InvalidRequest, NotReady, from_rpc
from wire.proto import common_pb2, control_pb2, inference_pb2

PROMPT = (5, 6, 7)


def hanging(kit, num_tokens):
    return kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(num_tokens))


async def read_from(call, first_idx):
    """Every token of a stream that starts at `first_idx`, its last message, numbering checked."""
    ids, last = [], None
    async for last in call:
        assert last.first_idx == first_idx + len(ids)
        ids.extend(last.token_ids)
    return ids, last


async def error_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_from(call, 0)
    return from_rpc(caught.value)


def test_two_streams_with_one_id_share_one_run(kit):
    async def main():
        async with kit.open_lab() as lab:
            calls = [lab.call(PROMPT, max_tokens=9, request_id="same") for _ in range(5)]
            answers = await asyncio.gather(*(lab.tokens(call) for call in calls))
            assert answers == [kit.expected(PROMPT, 9)] * 5
            assert len(lab["d0"].requests) == 1

    kit.run(main())


@pytest.mark.parametrize("resume_from", [0, 2, 4, 9])
def test_broken_stream_is_resumed_while_the_request_runs(kit, resume_from):
    async def main():
        worker = hanging(kit, 4)
        async with kit.open_lab(worker) as lab:
            call = lab.call(PROMPT, max_tokens=9, request_id="r")
            await lab.delivered(4)
            call.cancel()
            await lab.until(lambda: lab.metric("requests_total", code="CANCELLED") == 1)
            again = lab.call(PROMPT, max_tokens=9, request_id="r", resume_from=resume_from)
            reading = asyncio.create_task(read_from(again, resume_from))
            await lab.until(lambda: lab.metric("resumes_total", state="running") == 1)
            worker.release.set()
            ids, last = await reading
            assert ids == kit.expected(PROMPT, 9)[resume_from:]
            assert last.finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert last.usage.completion_tokens == 9
            assert len(worker.requests) == 1
            assert not worker.is_cancelled.is_set()
            await lab.idle()
            assert lab.service.ledger.loads == {}

    kit.run(main())


@pytest.mark.parametrize("resume_from", [0, 3, 6])
def test_whole_answer_is_given_again(kit, resume_from):
    async def main():
        async with kit.open_lab() as lab:
            await lab.tokens(lab.call(PROMPT, max_tokens=6, request_id="r"))
            await lab.idle()
            again = lab.call(PROMPT, max_tokens=6, request_id="r", resume_from=resume_from)
            ids, last = await read_from(again, resume_from)
            assert ids == kit.expected(PROMPT, 6)[resume_from:]
            assert last.finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert len(lab["d0"].requests) == 1
            assert lab.metric("resumes_total", state="finished") == 1

    kit.run(main())


def test_answer_that_is_not_kept_is_made_again_with_the_same_seed(kit):
    async def main():
        async with kit.open_lab(keep_requests=0) as lab:
            await lab.tokens(lab.call(PROMPT, max_tokens=6, request_id="r"))
            await lab.idle()
            again = lab.call(PROMPT, max_tokens=6, request_id="r", resume_from=4)
            assert (await read_from(again, 4))[0] == kit.expected(PROMPT, 6)[4:]
            first, second = lab["d0"].requests
            assert first.sampling == second.sampling
            assert first.request_id != second.request_id

    kit.run(main())


def test_another_request_under_the_same_id_is_refused(kit):
    async def main():
        worker = hanging(kit, 1)
        async with kit.open_lab(worker) as lab:
            running = lab.call(PROMPT, max_tokens=3, request_id="r")
            await running.read()
            error = await error_of(lab.call(PROMPT, max_tokens=4, request_id="r"))
            assert isinstance(error, InvalidRequest)
            assert error.field == "request_id"
            worker.release.set()
            await lab.drain_call(running)
            await lab.idle()
            error = await error_of(lab.call(PROMPT, max_tokens=4, request_id="r"))
            assert error.field == "request_id"

    kit.run(main())


@pytest.mark.parametrize(("request_id", "resume_from"), [("", 1), ("r", 8)])
def test_resume_from_that_cannot_be_is_refused(kit, request_id, resume_from):
    async def main():
        async with kit.open_lab() as lab:
            error = await error_of(
                lab.call(PROMPT, max_tokens=6, request_id=request_id, resume_from=resume_from)
            )
            assert isinstance(error, InvalidRequest)
            assert error.field == "resume_from"

    kit.run(main())


def test_request_whose_client_does_not_come_back_is_cancelled(kit):
    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker, resume_grace_s=0.05) as lab:
            call = lab.call(PROMPT, max_tokens=9, request_id="r")
            await lab.delivered(2)
            call.cancel()
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()
            assert lab.service.ledger.loads == {}
            worker.release.set()
            assert await lab.tokens(lab.call(PROMPT, max_tokens=9, request_id="r")) == kit.expected(PROMPT, 9)

    kit.run(main())


def test_cancel_ends_a_request_and_every_stream_of_it_at_once(kit):
    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker, resume_grace_s=60) as lab:
            calls = [lab.call(PROMPT, max_tokens=9, request_id="r") for _ in range(2)]
            await lab.delivered(4)
            asked = inference_pb2.CancelRequest(request_id="r")
            assert (await lab.stub.Cancel(asked)).was_running
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await lab.drain_call(call)
                assert caught.value.code() is grpc.StatusCode.CANCELLED
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()
            assert not (await lab.stub.Cancel(asked)).was_running
            assert len(worker.requests) == 1

    kit.run(main())


async def outputs_of(call, num_outputs):
    """The tokens of each output of a stream, -1 for its end; each is numbered on by itself."""
    outputs, next_idxs = [[] for _ in range(num_outputs)], {}
    async for message in call:
        output, count = message.output_idx, len(message.token_ids)
        assert message.first_idx == next_idxs.get(output, message.first_idx)
        next_idxs[output] = message.first_idx + count
        outputs[output] += [*message.token_ids, *([-1] if message.finish_reason else [])]
    return outputs


@pytest.mark.parametrize("resume_each", [[], [0, 0], [1, 4], [4, 2]])
def test_several_outputs_are_resumed_while_they_run(kit, resume_each):
    async def main():
        worker = hanging(kit, 4)
        async with kit.open_lab(worker) as lab:
            call = lab.call(PROMPT, max_tokens=9, n=2, request_id="r")
            await lab.delivered(8)
            call.cancel()
            await lab.until(lambda: lab.metric("requests_total", code="CANCELLED") == 1)
            again = lab.call(PROMPT, max_tokens=9, n=2, request_id="r", resume_each=resume_each)
            reading = asyncio.create_task(outputs_of(again, 2))
            await lab.until(lambda: lab.metric("resumes_total", state="running") == 1)
            worker.release.set()
            whole = [*kit.expected(PROMPT, 9), -1]
            assert await reading == [whole[start:] for start in resume_each or [0, 0]]
            assert len(worker.requests) == 2
            await lab.idle()
            assert lab.service.ledger.loads == {}

    kit.run(main())


@pytest.mark.parametrize("keep_requests", [0, 9], ids=["made again", "kept"])
def test_several_outputs_that_ended_are_given_again_from_where_each_is_wanted(kit, keep_requests):
    """Of output 0 the client has even the end."""

    async def main():
        async with kit.open_lab(keep_requests=keep_requests) as lab:
            whole = [*kit.expected(PROMPT, 6), -1]
            asked = {"max_tokens": 6, "n": 3, "request_id": "r"}
            assert await outputs_of(lab.call(PROMPT, **asked), 3) == [whole] * 3
            await lab.idle()
            again = lab.call(PROMPT, **asked, resume_each=[7, 6, 2])
            assert await outputs_of(again, 3) == [[], [-1], whole[2:]]
            seeds = [request.sampling.seed for request in lab["d0"].requests]
            # The requests of the outputs reach the worker in any order.
            assert sorted(seeds[3:]) == ([] if keep_requests else sorted(seeds[:3]))

    kit.run(main())


def test_cancel_ends_every_output_of_a_request(kit):
    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker, resume_grace_s=60) as lab:
            call = lab.call(PROMPT, max_tokens=9, n=3, request_id="r")
            await lab.delivered(6)
            assert (await lab.stub.Cancel(inference_pb2.CancelRequest(request_id="r"))).was_running
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.drain_call(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            await lab.idle()
            assert lab.service.ledger.loads == {}
            assert len(worker.requests) == 3

    kit.run(main())


@pytest.mark.parametrize("how", ["field", "metadata"])
def test_request_of_another_tenant_is_not_reached_by_its_id(kit, how):
    """Neither cancelled nor joined; each tenant has its own request under that id."""

    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker) as lab:

            def of(tenant):
                named = how == "field"
                return {"tenant": tenant} if named else {}, None if named else (("x-tenant", tenant),)

            (mine, my_metadata), (others, other_metadata) = of("a"), of("b")
            asked = lab.request(PROMPT, max_tokens=9, request_id="r", **mine)
            call = lab.stub.Generate(asked, metadata=my_metadata)
            await lab.delivered(2)
            cancel = inference_pb2.CancelRequest(request_id="r", **others)
            assert not (await lab.stub.Cancel(cancel, metadata=other_metadata)).was_running
            assert not (await lab.stub.Cancel(inference_pb2.CancelRequest(request_id="r"))).was_running
            asked = lab.request(PROMPT, max_tokens=3, request_id="r", **others)
            other = lab.stub.Generate(asked, metadata=other_metadata)
            worker.release.set()
            assert await lab.tokens(other) == kit.expected(PROMPT, 3)
            assert await lab.tokens(call) == kit.expected(PROMPT, 9)
            assert lab.metric("resumes_total", state="running") == 0

    kit.run(main())


def test_stream_with_more_time_outlives_the_one_that_began(kit):
    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker) as lab:
            short = lab.call(PROMPT, max_tokens=9, request_id="r", timeout=0.5)
            await short.read()
            patient = asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=9, request_id="r")))
            await lab.until(lambda: lab.metric("resumes_total", state="running") == 1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.drain_call(short)
            assert isinstance(from_rpc(caught.value), DeadlinePassed)
            worker.release.set()
            assert await patient == kit.expected(PROMPT, 9)

    kit.run(main())


def test_streams_of_a_router_that_stops_see_not_ready(kit):
    async def main():
        worker = hanging(kit, 2)
        async with kit.open_lab(worker, drain_s=0) as lab:
            call = lab.call(PROMPT, max_tokens=9, request_id="r")
            await lab.delivered(2)
            await lab.service.drain()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.drain_call(call)
            assert isinstance(from_rpc(caught.value), NotReady)
            assert lab.service.num_active == 0

    kit.run(main())


@pytest.mark.parametrize("num_before", [0, 3])
def test_client_goes_on_by_itself_on_another_router(kit, num_before):
    async def main():
        worker = hanging(kit, num_before)
        async with kit.open_lab(worker) as lab:
            port = lab.service.grpc_port
            async with InferenceClient(f"127.0.0.1:{port}") as client:
                stream = asyncio.create_task(client.tokens(PROMPT, GenerateOptions(max_tokens=9)))
                await worker.is_hanging.wait()
                await lab.delivered(num_before)
                await lab.service.stop()
                worker.release.set()
                config = {**lab.config.model_dump(), "grpc_port": port}
                lab.service = RouterService(RouterConfig(**config), controller_address=lab.controller.address)
                await lab.service.start()
                assert await stream == kit.expected(PROMPT, 9)
                first, second = worker.requests
                assert first.sampling == second.sampling

    kit.run(main())


def test_client_goes_on_with_several_outputs_on_another_router(kit):
    async def main():
        worker = hanging(kit, 3)
        async with kit.open_lab(worker) as lab:
            port = lab.service.grpc_port
            async with InferenceClient(f"127.0.0.1:{port}") as client:
                answers = asyncio.create_task(client.answer(PROMPT, GenerateOptions(max_tokens=9, n=2)))
                await lab.delivered(6)
                await lab.service.stop()
                worker.release.set()
                config = {**lab.config.model_dump(), "grpc_port": port}
                lab.service = RouterService(RouterConfig(**config), controller_address=lab.controller.address)
                await lab.service.start()
                assert [answer.token_ids for answer in await answers] == [kit.expected(PROMPT, 9)] * 2

    kit.run(main())


def test_client_that_leaves_its_stream_cancels_the_request(kit):
    async def main():
        worker = hanging(kit, 3)
        async with kit.open_lab(worker, resume_grace_s=60) as lab:
            async with InferenceClient(f"127.0.0.1:{lab.service.grpc_port}") as client:
                stream = client.stream(PROMPT, GenerateOptions(max_tokens=9))
                await anext(stream)
                await stream.aclose()
                await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()

    kit.run(main())


def test_client_without_a_router_is_told_at_once(kit):
    async def main():
        async with kit.open_lab() as lab:
            await lab.service.stop()
            async with InferenceClient(f"127.0.0.1:{lab.service.grpc_port}") as client:
                with pytest.raises(NotReady, match="no router answers"):
                    await client.tokens(PROMPT, GenerateOptions(max_tokens=9))

    kit.run(main())
