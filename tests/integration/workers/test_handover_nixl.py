"""Rows that are read over NIXL by real agents: what is read is what was left, or it is refused."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.workers.lab import Cluster, needs_nixl, open_cluster, run_test, until
from tests.integration.workers.mangler import lying_prefill
from tests.integration.workers.test_handover import GOLDEN, HANG_S, TEXT, refused, workers
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.proto import attention_pb2
from wire.rpc import PREFILL_METHOD

pytestmark = needs_nixl

NIXL = workers("nixl")
LONG = GOLDEN.prompt * 5
"""200 tokens, 326,400 bytes of rows; a row has 544."""
SMALL = {"nixl_bytes": 65_536, "lease_s": 0.8}
"""Room for no more than 120 rows at a time."""


def sent(cluster: Cluster, form: str) -> float:
    return cluster.metric("prefill-0", "kv_frames_total", form=form)


def replace_place(data: bytes, change: Callable[[attention_pb2.KvPlace], None]) -> bytes:
    """A frame that says another place, with a checksum that fits."""
    frame = decode_frame(data)
    header = attention_pb2.KvHeader.FromString(frame.meta)
    change(header.place)
    return encode_frame(Frame(kind=frame.kind, layer_idx=frame.layer_idx, meta=header.SerializeToString()))


def test_rows_are_read_and_not_sent() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1, attention=NIXL) as cluster:
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)) == TEXT
            assert [sent(cluster, form) for form in ("nixl", "plain", "no_room")] == [9, 0, 0]
            assert cluster.metric("prefill-0", "kv_transfers_total", result="sent") == 1
            assert refused(cluster) == {}

    run_test(main())


@pytest.mark.parametrize("speaker", NIXL)
def test_worker_that_speaks_nixl_alone_gets_and_sends_plain_frames(speaker: str) -> None:
    async def main() -> None:
        attention = {**workers("grpc"), speaker: NIXL[speaker]}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)) == TEXT
            assert [sent(cluster, form) for form in ("nixl", "plain", "no_room")] == [0, 9, 0]
            assert refused(cluster) == {}

    run_test(main())


LIES: dict[str, tuple[str, Callable[[attention_pb2.KvPlace], None]]] = {
    "of an agent that nobody knows": ("unread", lambda place: setattr(place, "agent", "nobody")),
    "of an agent that cannot be known": ("unread", lambda place: setattr(place, "agent_metadata", b"?" * 99)),
    "of an agent that was not introduced": ("unread", lambda place: setattr(place, "agent_metadata", b"")),
    "outside of the stage": ("unread", lambda place: setattr(place, "address", 64)),
    "of other rows": ("checksum", lambda place: setattr(place, "address", place.address + 64)),
    "with another sum": ("checksum", lambda place: setattr(place, "checksum", place.checksum ^ 1)),
    "in another form": ("rows", lambda place: setattr(place, "row_dtype", "float64")),
    "without width": ("rows", lambda place: setattr(place, "row_width", 0)),
    "of more than is taken at once": ("rows", lambda place: setattr(place, "row_width", 1 << 21)),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_place_is_refused_and_asked_for_again_in_plain_frames(lie: str) -> None:
    reason, change = LIES[lie]

    async def main() -> None:
        async with (
            open_cluster(num_experts=1, attention=NIXL) as cluster,
            lying_prefill(cluster, lambda f: [replace_place(f[0], change), *f[1:]]) as prefill,
        ):
            text = cluster.generate(
                GOLDEN.prompt, prefill="", prefill_address=prefill.address, max_tokens=len(TEXT)
            )
            assert await asyncio.wait_for(text, HANG_S) == TEXT
            assert prefill.transfers == [0, 1]
            assert refused(cluster) == {reason: 1}
            assert sent(cluster, "nixl") == 9
            assert sent(cluster, "plain") > 0
            # An agent that was believed gone is met again.
            assert await cluster.generate(LONG, max_tokens=1)
            assert refused(cluster) == {reason: 1}
            assert sent(cluster, "nixl") > 9

    run_test(main())


def test_rows_that_others_took_the_place_of_are_refused() -> None:
    """What a reader finds that comes after its pull is over at the prefill worker."""

    async def main() -> None:
        async with open_cluster(num_experts=1, attention=NIXL) as cluster:

            def overwrite(frames: list[bytes]) -> list[bytes]:
                cluster.attention["prefill-0"].server._link.staging[:] = 7
                return frames

            async with lying_prefill(cluster, overwrite) as prefill:
                text = await cluster.generate(
                    GOLDEN.prompt, prefill="", prefill_address=prefill.address, max_tokens=len(TEXT)
                )
            assert text == TEXT
            assert refused(cluster) == {"checksum": 1}

    run_test(main())


def test_stage_smaller_than_a_prompt_is_used_again() -> None:
    async def main() -> None:
        attention = {"prefill-0": {**NIXL["prefill-0"], **SMALL}, "decode-0": {**NIXL["decode-0"], **SMALL}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            alone = await cluster.generate(LONG, prefill="", max_tokens=4)
            cached = await cluster.generate(LONG[1:], max_tokens=1)
            assert cached
            assert sent(cluster, "nixl") * 16 * 544 > SMALL["nixl_bytes"]
            assert await cluster.generate(LONG, max_tokens=4) == alone

    run_test(main())


def test_rows_without_room_in_the_stage_go_in_plain_frames() -> None:
    """Nobody reads before everything was sent, and then the rows come in either form."""

    async def main() -> None:
        attention = {"prefill-0": {**NIXL["prefill-0"], **SMALL}, "decode-0": NIXL["decode-0"]}
        async with (
            open_cluster(num_experts=1, attention=attention) as cluster,
            lying_prefill(cluster, lambda f: f) as prefill,
        ):
            text = cluster.generate(GOLDEN.prompt * 2, prefill="", prefill_address=prefill.address)
            assert await text == await cluster.generate(GOLDEN.prompt * 2, prefill="")
            assert sent(cluster, "nixl") > 0
            assert sent(cluster, "no_room") > 0
            assert refused(cluster) == {}

    run_test(main())


@pytest.mark.parametrize("num_frames", [1, 10])
def test_stage_is_free_when_nobody_reads_for_the_lease(num_frames: int) -> None:
    """The receiver takes frames, and none of the rows that they tell of."""

    async def main() -> None:
        attention = {"prefill-0": {**NIXL["prefill-0"], "lease_s": 0.2}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            stage = cluster.attention["prefill-0"].server._sender.stage
            call = cluster.channel(cluster.attention["prefill-0"]).unary_stream(
                PREFILL_METHOD, request_serializer=attention_pb2.SequenceRequest.SerializeToString
            )(
                attention_pb2.SequenceRequest(
                    request_id="r", token_ids=GOLDEN.prompt, max_tokens=1, nixl_bytes=1 << 20
                ),
                metadata=cluster.handshake.to_metadata(),
            )
            kinds = [decode_frame(await call.read()).kind for _ in range(num_frames)]
            assert kinds[0] is FrameKind.KV_PLACED
            assert stage.num_lent > 0
            if num_frames == 1:
                call.cancel()
            await until(lambda: stage.num_lent == 0)

    run_test(main())


def test_read_that_does_not_end_is_given_up_in_time() -> None:
    """A quarter of the lease; what was begun ends later, and nobody wants it."""

    async def main() -> None:
        attention = {**NIXL, "decode-0": {**NIXL["decode-0"], "lease_s": 0.8}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            link = cluster.attention["decode-0"].server._link
            is_read, link._agent.is_read = link._agent.is_read, lambda _: False
            text = cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT))
            assert await asyncio.wait_for(text, HANG_S) == TEXT
            assert refused(cluster) == {"unread": 1}
            assert link._room.num_lent == 1
            link._agent.is_read = is_read
            await until(lambda: link._room.num_lent == 0)

    run_test(main())


def test_broken_link_leaves_plain_frames() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1, attention=NIXL) as cluster:
            link = cluster.attention["decode-0"].server._link

            def fail() -> Any:
                raise RuntimeError("injected")

            link._agent.take_messages = fail
            await until(lambda: link.area_bytes == 0)
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)) == TEXT
            assert [sent(cluster, form) for form in ("nixl", "plain", "no_room")] == [0, 9, 0]

    run_test(main())


def test_two_processes_over_tcp_and_a_killed_one() -> None:
    """Both agents in processes of their own: nixl_pair.py says what it does."""
    script = [sys.executable, "-m", "tests.integration.workers.nixl_pair"]
    env = {**os.environ, "UCX_TLS": "tcp"}
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["read 1000000 of 1000000", "peer told of ticket", "unread"], (
        done.stderr
    )
    assert done.returncode == 0
