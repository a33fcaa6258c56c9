"""The streams that carry what many sequences tell to one router."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from wire.errors import InvalidRequest, NotReady
from wire.proto import attention_pb2, common_pb2
from workers.attention.event_streams import EventStreams, StreamTaker
from workers.attention.types import Admitted, Event, Failed, Finish, NewToken, PromptLogprobs


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def told(batch: attention_pb2.EventBatch) -> list[tuple[int, list[int]]]:
    return [(one.sequence_number, list(one.event.token_ids)) for one in batch.events]


def test_events_of_one_step_are_one_message_in_their_order() -> None:
    async def main() -> None:
        streams = EventStreams()
        batches = streams.follow("s")
        assert told(await anext(batches)) == []  # it is open
        takers = [StreamTaker(streams.find("s"), number, asyncio.Queue()) for number in (7, 8)]  # type: ignore[arg-type]
        for step in range(2):
            waiting = asyncio.ensure_future(anext(batches))
            await asyncio.sleep(0)
            for taker in takers:
                taker.put_nowait(NewToken(token_id=step, finish=None))
            assert told(await waiting) == [(7, [step]), (8, [step])]
        await batches.aclose()

    run(main())


def test_last_token_goes_both_ways_and_what_is_no_text_only_to_the_call() -> None:
    async def main() -> None:
        streams, rest = EventStreams(), asyncio.Queue[Event]()
        batches = streams.follow("s")
        await anext(batches)
        stream = streams.find("s")
        assert stream is not None
        taker, failed = StreamTaker(stream, 1, rest), Failed(NotReady("leaves"))
        last = NewToken(token_id=4, finish=Finish.LENGTH)
        for event in (Admitted(), PromptLogprobs(rows=()), NewToken(token_id=3, finish=None), last, failed):
            taker.put_nowait(event)
        got = (await anext(batches)).events
        assert [list(one.event.token_ids) for one in got] == [[], [3], [4]]
        assert got[-1].event.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert [rest.get_nowait() for _ in range(rest.qsize())] == [Admitted(), last, failed]
        await batches.aclose()

    run(main())


def test_request_names_a_stream_that_is_open_or_none() -> None:
    async def main() -> None:
        streams = EventStreams()
        assert streams.find("") is None
        batches = streams.follow("s")
        await anext(batches)
        assert streams.find("s") is not None
        await batches.aclose()
        with pytest.raises(NotReady, match="has ended"):
            streams.find("s")

    run(main())


@pytest.mark.parametrize("stream_id", ["", "s"])
def test_stream_needs_an_id_of_its_own(stream_id: str) -> None:
    async def main() -> None:
        streams = EventStreams()
        first = streams.follow("s")
        await anext(first)
        with pytest.raises(InvalidRequest, match="stream_id"):
            await anext(streams.follow(stream_id))
        assert streams.find("s") is not None
        await first.aclose()

    run(main())


def test_close_ends_a_stream_behind_what_it_holds() -> None:
    async def main() -> None:
        streams = EventStreams()
        batches = streams.follow("s")
        await anext(batches)
        stream = streams.find("s")
        assert stream is not None
        stream.put(1, NewToken(token_id=3, finish=None))
        streams.close()
        assert [told(batch) async for batch in batches] == [[(1, [3])]]

    run(main())
