"""Events cross from the engine's thread to the loop: in order, and with one wake-up for many."""

import asyncio
import threading
from unittest.mock import patch

from workers.attention.relay import EventRelay
from workers.attention.types import Event, NewToken

NUM_SEQUENCES = 32
NUM_STEPS = 20


def test_every_queue_gets_its_events_in_order() -> None:
    async def run() -> list[list[int]]:
        relay, queues = EventRelay(), [asyncio.Queue[Event]() for _ in range(NUM_SEQUENCES)]
        sinks = [relay.sink(events) for events in queues]

        def step() -> None:
            for token_id in range(NUM_STEPS):
                for sink in sinks:
                    sink(NewToken(token_id, None))

        thread = threading.Thread(target=step)
        thread.start()
        got = [[await _token(events) for _ in range(NUM_STEPS)] for events in queues]
        thread.join()
        return got

    assert asyncio.run(run()) == [list(range(NUM_STEPS))] * NUM_SEQUENCES


def test_events_that_gather_wake_the_loop_once() -> None:
    async def run() -> int:
        relay, loop = EventRelay(), asyncio.get_running_loop()
        queues = [asyncio.Queue[Event]() for _ in range(NUM_SEQUENCES)]
        sinks = [relay.sink(events) for events in queues]
        with patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as wake:
            for sink in sinks:
                sink(NewToken(1, None))
            assert [await _token(events) for events in queues] == [1] * NUM_SEQUENCES
        return wake.call_count

    assert asyncio.run(run()) == 1


async def _token(events: "asyncio.Queue[Event]") -> int:
    event = await events.get()
    assert isinstance(event, NewToken)
    return event.token_id
