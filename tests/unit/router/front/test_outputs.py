"""Several outputs of one request: their seeds and names, and streams that mix and end together."""

import asyncio
import contextlib

import pytest

from router.front.outputs import derive_seed, merge_streams, plan_outputs
from router.requests.types import AdmittedRequest
from wire.proto.common_pb2 import SamplingParams

REQUEST = AdmittedRequest(
    request_id="r",
    wire_id="r~1",
    model="f",
    prompt_ids=(5, 6),
    max_tokens=3,
    stop_token_ids=(),
    stop=("x",),
    sampling=SamplingParams(seed=2**64 - 1, top_k=4, prompt_logprobs=1),
)


def test_first_output_is_the_request_itself():
    assert plan_outputs(REQUEST, 1) == (REQUEST,)
    assert plan_outputs(REQUEST, 3)[0] is REQUEST


def test_others_differ_in_seed_and_name_and_tell_no_prompt():
    outputs = plan_outputs(REQUEST, 4)
    assert [output.wire_id for output in outputs] == ["r~1", "r~1.1", "r~1.2", "r~1.3"]
    assert len({output.sampling.seed for output in outputs}) == 4
    assert [output.sampling.HasField("prompt_logprobs") for output in outputs] == [True, False, False, False]
    assert {(output.request_id, output.sampling.top_k, output.stop) for output in outputs} == {
        ("r", 4, ("x",))
    }


def test_seeds_do_not_depend_on_how_many_there_are_nor_on_the_process():
    assert plan_outputs(REQUEST, 4)[2] == plan_outputs(REQUEST, 3)[2]
    assert [derive_seed(7, output_idx) for output_idx in range(3)] == [
        7,
        int.from_bytes(bytes.fromhex(SEED_7_1), "little"),
        int.from_bytes(bytes.fromhex(SEED_7_2), "little"),
    ]


# blake2b of the two numbers as 8 bytes each, little end first: `b2sum -l 64` of them.
SEED_7_1 = "e0f322135f97a7cd"
SEED_7_2 = "e3b95eda1994833e"


class Streams:
    """Streams under a test's control; knows which were closed."""

    def __init__(self) -> None:
        self.closed = set()
        self.num_taken = {}

    async def count(self, name, num_items, *, error=None, gate=None):
        try:
            for idx in range(num_items):
                self.num_taken[name] = idx + 1
                yield (name, idx)
            if gate is not None:
                await gate.wait()
            if error is not None:
                raise error
        finally:
            self.closed.add(name)


async def collect(streams):
    async with contextlib.aclosing(merge_streams(streams)) as merged:
        return [item async for item in merged]


def test_every_stream_comes_whole_and_in_its_own_order():
    streams = Streams()
    got = asyncio.run(
        collect([streams.count(name, number) for name, number in (("a", 3), ("b", 0), ("c", 5))])
    )
    for idx, (name, number) in enumerate((("a", 3), ("b", 0), ("c", 5))):
        assert [item for stream_idx, item in got if stream_idx == idx] == [(name, i) for i in range(number)]
    assert streams.closed == {"a", "b", "c"}


def test_streams_take_turns_and_none_runs_ahead():
    async def main():
        streams = Streams()
        async with contextlib.aclosing(merge_streams([streams.count(n, 100) for n in "ab"])) as merged:
            for _ in range(10):
                await anext(merged)
            assert max(streams.num_taken.values()) <= 7
        assert streams.closed == {"a", "b"}

    asyncio.run(main())


def test_first_error_is_raised_and_closes_the_others():
    async def main():
        streams, never = Streams(), asyncio.Event()
        with pytest.raises(LookupError):
            await collect([streams.count("a", 1, gate=never), streams.count("b", 2, error=LookupError())])
        assert streams.closed == {"a", "b"}

    asyncio.run(main())


def test_cancelling_the_reader_closes_every_stream():
    async def main():
        streams, never = Streams(), asyncio.Event()
        reading = asyncio.create_task(collect([streams.count(n, 1, gate=never) for n in "abc"]))
        for _ in range(20):  # turns of the loop, more than enough for all to have begun
            await asyncio.sleep(0)
        assert len(streams.num_taken) == 3
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert streams.closed == {"a", "b", "c"}
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
