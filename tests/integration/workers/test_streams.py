"""Events through the one stream of a router: those that the calls themselves would bring."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.integration.workers.lab import Cluster, drain, open_cluster, run_test, until
from tests.reference_data import goldens
from wire.errors import HandshakeRefused, NotReady, from_rpc
from wire.handshake import Handshake
from wire.proto import attention_pb2, attention_pb2_grpc

STREAM = "a-stream"
Told = dict[int, list[int]]


@contextlib.asynccontextmanager
async def following(cluster: Cluster, at: str = "decode-0") -> AsyncIterator[Told]:
    """What each sequence told through an open stream so far: its tokens."""
    stub = attention_pb2_grpc.AttentionStub(cluster.channel(cluster.attention[at]))
    call = stub.Follow(
        attention_pb2.FollowRequest(stream_id=STREAM), metadata=cluster.handshake.to_metadata()
    )
    told: Told = {}
    assert not (await call.read()).events

    async def read() -> None:
        while (batch := await call.read()) is not grpc.aio.EOF:
            for one in batch.events:
                told.setdefault(one.sequence_number, []).extend(one.event.token_ids)

    reading = asyncio.create_task(read())
    try:
        yield told
    finally:
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize("prefill", ["prefill-0", ""])
def test_texts_through_a_stream_are_the_goldens(prefill: str) -> None:
    async def main() -> None:
        cases = goldens("default")
        async with open_cluster("default") as cluster, following(cluster) as told:
            calls = [
                cluster.open_generate(
                    golden.prompt,
                    max_tokens=len(golden.tensor("greedy")),
                    prefill=prefill,
                    stream_id=STREAM,
                    sequence_number=number,
                )
                for number, golden in enumerate(cases)
            ]
            assert await asyncio.gather(*map(drain, calls)) == [[]] * len(cases)
            wanted = {number: golden.tensor("greedy").tolist() for number, golden in enumerate(cases)}
            await until(lambda: told == wanted)
            await cluster.is_empty()

    run_test(main())


def test_stream_that_is_not_open_is_refused_before_any_work() -> None:
    async def main() -> None:
        async with open_cluster("default") as cluster:
            with pytest.raises(NotReady, match="has ended"):
                await cluster.generate(goldens("default")[0].prompt, prefill="", stream_id="another")
            assert cluster.metric("decode-0", "dispatch_rows_total") == 0
            await cluster.is_empty()

    run_test(main())


def test_stream_of_a_stranger_is_refused() -> None:
    async def main() -> None:
        async with open_cluster("default") as cluster:
            cluster.handshake = Handshake(model="another")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async with following(cluster):
                    pass
            assert isinstance(from_rpc(raised.value), HandshakeRefused)

    run_test(main())


def test_stream_ends_with_its_worker_and_holds_nothing_up() -> None:
    async def main() -> None:
        async with open_cluster("default") as cluster:
            stub = attention_pb2_grpc.AttentionStub(cluster.channel(cluster.attention["decode-0"]))
            request = attention_pb2.FollowRequest(stream_id=STREAM)
            call = stub.Follow(request, metadata=cluster.handshake.to_metadata())
            assert not (await call.read()).events
            began_s = asyncio.get_running_loop().time()
            await cluster.attention.pop("decode-0").server.stop(grace_s=30)
            assert await call.read() is grpc.aio.EOF
            assert asyncio.get_running_loop().time() - began_s < 30

    run_test(main())
