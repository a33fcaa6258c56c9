"""Prompts go to the worker that has their beginning, unless it is too busy."""

import asyncio

from wire.proto import attention_pb2, common_pb2

PROMPT = tuple(range(20, 37))
OTHER = tuple(range(100, 117))


def reusing(num_cached_tokens):
    """A worker that says of every prompt after its first that so many tokens were cached."""

    async def script(worker, request, context):
        found = num_cached_tokens if len(worker.requests) > 1 else 0
        await context.write(attention_pb2.SequenceEvent(token_ids=[9], num_cached_tokens=found))
        await context.write(attention_pb2.SequenceEvent(finish_reason=common_pb2.FINISH_REASON_LENGTH))

    return script


def test_prompt_follows_its_cached_beginning(kit):
    async def main():
        async with kit.open_lab(kit.both("d0", reusing(16)), kit.both("d1", reusing(16))) as lab:
            script, lab["d0"].script = lab["d0"].script, kit.hang_after(0)
            busy = lab.call((3, 4, 5), max_tokens=1)
            await lab.started(lab["d0"])
            await lab.tokens(lab.call(PROMPT, max_tokens=1))
            lab["d0"].script = script
            busy.cancel()
            await lab.idle()
            for _ in range(3):
                await lab.tokens(lab.call((*PROMPT, 7), max_tokens=1))
            assert len(lab["d1"].requests) == 4
            assert lab.metric("routes_total", reason="prefix") == 3
            assert lab.metric("routes_total", reason="cold") == 2
            assert lab.metric("prefix_hit_tokens_total") == 48
            await lab.tokens(lab.call(OTHER, max_tokens=1))
            assert len(lab["d0"].requests) == 2

    kit.run(main())


def test_busy_worker_does_not_keep_its_prefix_for_itself(kit):
    async def main():
        hold = asyncio.Event()

        async def holding(worker, request, context):
            await hold.wait()
            await reusing(16)(worker, request, context)

        async with kit.open_lab(kit.both("d0", holding), kit.both("d1", holding)) as lab:
            calls = []
            for num_calls in range(1, 7):
                calls.append(asyncio.create_task(lab.tokens(lab.call(PROMPT, max_tokens=1))))
                await lab.until(lambda: sum(len(w.requests) for w in lab.workers.values()) == num_calls)  # noqa: B023 - used in this turn only
            assert [len(worker.requests) for worker in lab.workers.values()] == [3, 3]
            assert lab.metric("routes_total", reason="load") >= 1
            hold.set()
            await asyncio.gather(*calls)
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_worker_that_forgot_is_believed(kit):
    async def main():
        async with kit.open_lab(kit.both("d0", reusing(0)), kit.both("d1", reusing(0))) as lab:
            await lab.tokens(lab.call(OTHER, max_tokens=1))
            await lab.tokens(lab.call(PROMPT, max_tokens=1))
            await lab.tokens(lab.call(PROMPT, max_tokens=1))
            assert lab.metric("prefix_corrections_total") == 1
            await lab.tokens(lab.call(OTHER, max_tokens=1))
            assert lab.metric("routes_total", reason="prefix") == 1

    kit.run(main())


def test_prefix_of_a_worker_that_was_started_again_is_forgotten(kit):
    async def main():
        async with kit.open_lab(kit.both("d0", reusing(16))) as lab:
            await lab.tokens(lab.call(PROMPT, max_tokens=1))
            lab["d0"].incarnation = 2
            lab.push()
            await lab.pushed()
            await lab.tokens(lab.call(PROMPT, max_tokens=1))
            assert lab.metric("routes_total", reason="prefix") == 0

    kit.run(main())
