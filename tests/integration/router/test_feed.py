"""The one stream that brings the events of all sequences of a worker: shared, late, broken, never opened."""

import asyncio

import grpc.aio
import pytest

from router.requests import attempt
from wire.errors import DeadlinePassed, NotReady, WorkerLost, from_rpc
from wire.proto import attention_pb2

PROMPT = (5, 6, 7)


def test_all_requests_of_a_worker_share_one_stream(kit):
    async def main():
        async with kit.open_lab(kit.both("d0")) as lab:
            prompts = [(5, 6, number) for number in range(8)]
            texts = await asyncio.gather(*(lab.tokens(lab.call(ids, max_tokens=5)) for ids in prompts))
            assert texts == [kit.expected(ids, 5) for ids in prompts]
            assert len({request.stream_id for request in lab["d0"].requests}) == 1
            assert len({request.sequence_number for request in lab["d0"].requests}) == 8

    kit.run(main())


def test_stream_that_breaks_costs_no_token(kit):
    """The worker lives, and so do its calls: they are started again, on a new stream."""

    async def main():
        worker = kit.both("d0", kit.hang_after(4))
        async with kit.open_lab(worker) as lab:
            texts = [asyncio.create_task(lab.tokens(lab.call((5, 6, n), max_tokens=9))) for n in range(3)]
            await lab.delivered(12)
            worker.script = kit.answer
            for feed in worker.feeds.values():
                feed.put_nowait(None)
            assert [await text for text in texts] == [kit.expected((5, 6, n), 9) for n in range(3)]
            await worker.is_cancelled.wait()
            assert len({request.stream_id for request in worker.requests}) == 2
            assert lab.metric("replays_total") == 3
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_events_behind_the_end_of_their_call_are_read(kit):
    async def main():
        async def end_first(worker, request, context):
            async def tell_later():
                await asyncio.sleep(0.1)
                await kit.answer(worker, request, context)

            late.append(asyncio.create_task(tell_later()))

        late = []
        async with kit.open_lab(kit.both("d0", end_first)) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=6)) == kit.expected(PROMPT, 6)
            assert len(lab["d0"].requests) == 1
            await asyncio.gather(*late)

    kit.run(main())


def test_call_that_ends_without_an_end_mark_is_started_again(kit, monkeypatch):
    monkeypatch.setattr(attempt, "_LAST_EVENTS_S", 0.05)

    async def main():
        async def forget(worker, request, context):
            await kit.emit(request, context, limit=2)

        async with kit.open_lab(kit.both("d0", forget), kit.both("d1")) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=6)) == kit.expected(PROMPT, 6)
            (again,) = lab["d1"].requests
            assert list(again.token_ids) == [*PROMPT, *kit.expected(PROMPT, 2)]

    kit.run(main())


@pytest.mark.parametrize("later_s", [0.0, 0.1])
def test_stream_that_ends_with_its_call_is_not_waited_for(kit, later_s):
    """The worker told its last token and died; the token was lost with the stream."""

    async def main():
        async def end_both(worker, request, context):
            await kit.emit(request, context, limit=2)
            worker.script = kit.answer
            feed = worker.feeds[request.stream_id]
            asyncio.get_running_loop().call_later(later_s, feed.put_nowait, None)

        worker = kit.both("d0", end_both)
        async with kit.open_lab(worker) as lab:
            began_s = asyncio.get_running_loop().time()
            assert await lab.tokens(lab.call(PROMPT, max_tokens=6)) == kit.expected(PROMPT, 6)
            assert asyncio.get_running_loop().time() - began_s < attempt._LAST_EVENTS_S
            assert [request.attempt for request in worker.requests] == [0, 1]

    kit.run(main())


def test_events_of_a_call_that_was_given_up_reach_nobody(kit):
    async def main():
        async def go_on(worker, request, context):
            await kit.emit(request, context, limit=1)
            try:
                await asyncio.Event().wait()
            finally:
                await context.write(attention_pb2.SequenceEvent(token_ids=[9, 9, 9]))

        worker = kit.both("d0", go_on)
        async with kit.open_lab(worker) as lab:
            call = lab.call(PROMPT, max_tokens=6)
            await call.read()
            call.cancel()
            await worker.is_cancelled.wait()
            worker.script = kit.answer
            assert await lab.tokens(lab.call(PROMPT, max_tokens=6)) == kit.expected(PROMPT, 6)

    kit.run(main())


def test_error_of_a_call_is_told_though_the_stream_ends_with_it(kit):
    async def main():
        async def refuse_and_leave(worker, request, context):
            worker.feeds[request.stream_id].put_nowait(None)
            await kit.abort_with(context, NotReady("d0 leaves the cluster"))

        worker = kit.both("d0", refuse_and_leave)
        async with kit.open_lab(worker, kit.both("d1")) as lab:
            assert await lab.tokens(lab.call(PROMPT, max_tokens=3)) == kit.expected(PROMPT, 3)

    kit.run(main())


@pytest.mark.parametrize("deadline_s", [1.0, None])
def test_worker_that_never_opens_its_stream_is_not_waited_for_for_ever(kit, deadline_s):
    """A stopped process, say: up to the deadline, or until the cluster is rid of the worker."""

    async def main():
        worker = kit.both("d0")
        worker.opens_streams = False
        async with kit.open_lab(worker, ready_wait_s=0.3, num_replays=0) as lab:
            call = lab.call(PROMPT, max_tokens=3, timeout=deadline_s)
            reading = asyncio.create_task(lab.tokens(call))
            await lab.until(lambda: worker.num_asked > 0)
            if deadline_s is None:
                lab.push(without=("d0",))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await reading
            wanted = (WorkerLost, NotReady) if deadline_s is None else DeadlinePassed
            assert isinstance(from_rpc(raised.value), wanted)
            assert worker.requests == []
            await lab.idle()
            assert lab.service.ledger.loads == {}

    kit.run(main())
