"""The prefill worker's side of a hand-over: signs of life, and receivers that do not read."""

import asyncio
from typing import Any

import pytest

from tests.unit.workers.attention.harness import Lab, make_spec, open_engine
from wire.errors import WorkerLost
from workers.attention.drain import Door
from workers.attention.kv_send import KvSender
from workers.attention.kv_transfer import Alive, Fence, decode_transfer
from workers.attention.relay import EventRelay
from workers.attention.types import CacheRows, NewToken, Source

SPEC = make_spec(range(5, 25), source=Source.PREFILL_ONLY)
FENCE = Fence(request_id=SPEC.request_id, attempt=SPEC.attempt, transfer=3)


class Reader:
    """The call of a receiver that reads so many frames."""

    def __init__(self, num_frames: int = 1 << 20) -> None:
        self.events: list[Any] = []
        self.has_read = asyncio.Event()
        self._num_frames = num_frames

    async def write(self, data: bytes) -> None:
        if len(self.events) == self._num_frames:
            await asyncio.Event().wait()
        self.events.append(decode_transfer(FENCE, data))
        self.has_read.set()


def sender(lab: Lab) -> KvSender:
    return KvSender(
        engine=lab.engine, relay=EventRelay(), door=Door("prefill-0"), lease_s=0.04, metrics=lab.metrics
    )


def test_receiver_that_does_not_read_is_cut_off() -> None:
    async def main(lab: Lab) -> None:
        with pytest.raises(WorkerLost, match=r"its receiver read nothing for 0\.04 s"):
            await sender(lab).send(SPEC, 3, Reader(num_frames=2))
        await asyncio.to_thread(lab.is_empty)
        assert lab.metric("kv_transfers_total", result="cut_off") == 1

    with open_engine("default", max_step_tokens=4) as lab:
        asyncio.run(main(lab))


def test_prefill_that_has_nothing_to_send_gives_signs_of_life() -> None:
    async def main(lab: Lab) -> None:
        lab.door.hold()
        reader = Reader()
        sending = asyncio.create_task(sender(lab).send(SPEC, 3, reader))
        await reader.has_read.wait()
        assert reader.events[0] == Alive()
        lab.door.open()
        await sending
        told = [event for event in reader.events if not isinstance(event, Alive)]
        assert [type(event) for event in told] == [CacheRows] * 3 + [NewToken]
        assert lab.metric("kv_transfers_total", result="sent") == 1

    with open_engine("default") as lab:
        asyncio.run(main(lab))
