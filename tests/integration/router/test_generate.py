"""Generate through a real router: streams, numbering, cancellation, deadline, refusals."""

import asyncio

import grpc
import pytest

from wire.errors import (
    InvalidRequest,
    NotReady,
    Overloaded,
    PromptTooLong,
    UnknownModel,
    from_rpc,
)
from wire.proto import attention_pb2, common_pb2, control_pb2, inference_pb2


def test_generate_streams_every_token_once_in_order(kit):
    async def main():
        async with kit.open_lab() as lab:
            responses = [response async for response in lab.call(max_tokens=6, request_id="mine")]
            ids = [token_id for response in responses for token_id in response.token_ids]
            assert ids == kit.expected((5, 6, 7), 6)
            counts = [len(response.token_ids) for response in responses]
            assert [response.first_idx for response in responses] == [
                sum(counts[:idx]) for idx in range(len(counts))
            ]
            assert {response.request_id for response in responses} == {"mine"}
            assert responses[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert responses[-1].usage == inference_pb2.Usage(prompt_tokens=3, completion_tokens=6)

    kit.run(main())


def test_worker_gets_the_whole_order(kit):
    async def main():
        async with kit.open_lab() as lab:
            sampling = common_pb2.SamplingParams(temperature=0.5, top_p=0.9, top_k=7, seed=11)
            await lab.tokens(lab.call(max_tokens=2, sampling=sampling, timeout=20))
            (got,) = lab["d0"].requests
            assert list(got.token_ids) == [5, 6, 7]
            assert got.prompt_tokens == 3
            assert got.max_tokens == 2
            assert got.attempt == 0
            assert got.sampling == sampling
            assert list(got.stop_token_ids) == [1]
            assert got.prefill_address == lab["p0"].address
            assert lab["d0"].metadata[0]["moray-model"] == "f00d"
            assert lab["d0"].metadata[0]["moray-page-tokens"] == "4"
            assert 0 < lab["d0"].seconds_left[0] <= 21  # gRPC rounds up

    kit.run(main())


def test_seed_is_drawn_and_end_token_left_out_where_the_client_wants_it_so(kit):
    async def main():
        async with kit.open_lab() as lab:
            await lab.tokens(lab.call(max_tokens=1, ignore_eos=True))
            await lab.tokens(lab.call(max_tokens=1))
            first, second = lab["d0"].requests
            assert first.sampling.HasField("seed")
            assert first.sampling.seed != second.sampling.seed
            assert list(first.stop_token_ids) == []
            assert first.request_id != second.request_id

    kit.run(main())


def test_many_requests_at_once_keep_apart(kit):
    async def main():
        async with kit.open_lab() as lab:
            prompts = [tuple(range(2, 3 + idx)) for idx in range(8)]
            answers = await asyncio.gather(*(lab.tokens(lab.call(ids, max_tokens=9)) for ids in prompts))
            assert answers == [kit.expected(ids, 9) for ids in prompts]

    kit.run(main())


def test_cancelling_the_call_cancels_the_worker_and_frees_the_ledger(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(2))
        async with kit.open_lab(worker) as lab:
            call = lab.call(max_tokens=10)
            await call.read()
            await worker.is_hanging.wait()
            await lab.delivered(2)
            load = lab.service.ledger.loads["d0#1"]
            assert (load.num_requests, load.reserved_pages, load.queued_prompt_tokens) == (1, 4, 0)
            call.cancel()
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()
            assert lab.service.ledger.loads == {}
            lab.service.ledger.check_integrity()
            assert lab.metric("requests_total", code="CANCELLED") == 1
            assert lab.metric("active_requests") == 0

    kit.run(main())


async def _flood(worker, request, context):
    for _ in range(request.max_tokens // 1000):
        await context.write(attention_pb2.SequenceEvent(token_ids=[299] * 1000))


def test_a_client_that_vanishes_while_the_stream_is_full_frees_the_worker(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=_flood)
        async with kit.open_lab(worker, push=False) as lab:
            lab.context_tokens = 2_000_000
            lab.push()
            # Never read: the stream fills up, and the router sits in a write when the client goes.
            call = lab.call(max_tokens=1_900_000)
            await lab.delivered(10_000)
            call.cancel()
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_deadline_ends_the_call_and_the_worker(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(1))
        async with kit.open_lab(worker) as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(max_tokens=10, timeout=0.5))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            await lab.idle()
            assert lab.service.ledger.loads == {}
            assert lab.metric("requests_total", code="DEADLINE_EXCEEDED") == 1

    kit.run(main())


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"tokens": None}, InvalidRequest, "prompt"),
        ({"ids": ()}, InvalidRequest, "tokens"),
        ({"ids": (5, 300)}, InvalidRequest, "tokens"),
        ({"text": "hello"}, InvalidRequest, "text"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"max_tokens": 62}, PromptTooLong, "max_tokens"),
        ({"ids": (3,) * 64}, PromptTooLong, "tokens"),
        ({"model": "other"}, UnknownModel, "model"),
        ({"request_id": "a b"}, InvalidRequest, "request_id"),
        ({"sampling": common_pb2.SamplingParams(top_p=2.0)}, InvalidRequest, "sampling.top_p"),
    ],
)
def test_malformed_request_is_refused_by_field(kit, fields, kind, field):
    async def main():
        async with kit.open_lab() as lab:
            if "tokens" in fields:
                call = lab.stub.Generate(inference_pb2.GenerateRequest())
            else:
                call = lab.call(**fields)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(call)
            error = from_rpc(caught.value)
            assert type(error) is kind
            assert error.field == field
            assert caught.value.code() is kind.code
            assert lab["d0"].requests == []
            assert lab.metric("requests_total", code=kind.code.name) == 1

    kit.run(main())


def test_one_request_too_many_is_refused_before_any_work(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(1))
        async with kit.open_lab(worker, max_active_requests=1) as lab:
            running = lab.call(max_tokens=3)
            await running.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call())
            error = from_rpc(caught.value)
            assert isinstance(error, Overloaded)
            assert "max_active_requests" in error.message
            worker.release.set()
            await lab.drain_call(running)

    kit.run(main())


def test_message_beyond_the_limit_is_refused(kit):
    async def main():
        async with kit.open_lab() as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(text="x" * (17 << 20)))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    kit.run(main())


def test_request_before_the_cluster_is_ready_waits_for_it(kit):
    async def main():
        async with kit.open_lab(push=False) as lab:
            call = asyncio.create_task(lab.tokens(lab.call(max_tokens=3)))
            await lab.active(1)
            lab.push()
            assert await call == kit.expected((5, 6, 7), 3)

    kit.run(main())


def test_request_that_waits_in_vain_says_for_what(kit):
    async def main():
        async with kit.open_lab(push=False, ready_wait_s=0.2) as lab:
            lab.push(not_ready=("p0",))
            await lab.pushed()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call())
            error = from_rpc(caught.value)
            assert isinstance(error, NotReady)
            assert "a prefill worker" in error.message

    kit.run(main())


def test_list_models_and_get_cluster(kit):
    async def main():
        async with kit.open_lab(push=False) as lab:
            assert not (await lab.stub.ListModels(inference_pb2.ListModelsRequest())).models
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.stub.GetCluster(inference_pb2.GetClusterRequest())
            assert isinstance(from_rpc(caught.value), NotReady)
            lab.push()
            await lab.pushed()
            (model,) = (await lab.stub.ListModels(inference_pb2.ListModelsRequest())).models
            assert model.name == "toy"
            assert await lab.stub.GetCluster(inference_pb2.GetClusterRequest()) == lab.controller.snapshot

    kit.run(main())


def test_outputs_of_one_request_are_requests_of_their_own(kit):
    async def main():
        async with kit.open_lab() as lab:
            sampling = common_pb2.SamplingParams(temperature=1.0, seed=5)
            responses = [response async for response in lab.call(max_tokens=4, n=3, sampling=sampling)]
            for output_idx in range(3):
                own = [response for response in responses if response.output_idx == output_idx]
                assert [token for response in own for token in response.token_ids] == kit.expected(
                    (5, 6, 7), 4
                )
                assert [response.first_idx for response in own] == [0, 1, 2, 3, 4]
                assert own[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
                assert own[-1].usage == inference_pb2.Usage(prompt_tokens=3, completion_tokens=4)
            requests = lab["d0"].requests
            assert sorted(request.sampling.seed for request in requests)[0] == 5
            assert len({request.sampling.seed for request in requests}) == 3
            assert len({request.request_id for request in requests}) == 3
            assert lab.metric("requests_total", code="OK") == 1

    kit.run(main())


def test_cancelling_ends_every_output(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(1))
        async with kit.open_lab(worker) as lab:
            call = lab.call(max_tokens=4, n=3)
            for _ in range(3):
                await call.read()
            call.cancel()
            await lab.idle()
            assert len(worker.requests) == 3
            worker.release.set()
            assert lab.service.ledger.loads == {}

    kit.run(main())
