"""Cache frames that are damaged, late, doubled or of something else: the right tokens, and soon."""

import asyncio
import threading
import time
from typing import Any

import grpc.aio
import pytest

from tests.integration.workers.lab import Cluster, drain, needs_nixl, open_cluster, run_test, until
from tests.integration.workers.mangler import Mangle, change, kv_at, lying_prefill, move
from tests.reference_data import goldens
from wire.errors import WorkerLost
from wire.proto import attention_pb2
from wire.rpc import PREFILL_METHOD

GOLDEN = goldens("default")[2]
"""40 tokens in 3 layers; chunks of 16 make 9 frames of rows."""
TEXT = GOLDEN.tensor("greedy").tolist()
TRANSPORTS = ["grpc", pytest.param("nixl", marks=needs_nixl)]
WORKERS: dict[str, dict[str, Any]] = {"prefill-0": {"max_step_tokens": 16}, "decode-0": {}}
LEASE_S = 0.5
IMPATIENT: dict[str, dict[str, Any]] = {
    "prefill-0": {"max_step_tokens": 16},
    "decode-0": {"lease_s": LEASE_S},
}
HANG_S = 5.0


def workers(transport: str) -> dict[str, dict[str, Any]]:
    """WORKERS, with rows that travel so."""
    return {name: {**fields, "transport": transport} for name, fields in WORKERS.items()}


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _with(frames: list[bytes], i: int, data: bytes) -> list[bytes]:
    return [*frames[:i], data, *frames[i + 1 :]]


def _swapped(frames: list[bytes], i: int, j: int) -> list[bytes]:
    changed = list(frames)
    changed[i], changed[j] = changed[j], changed[i]
    return changed


LIES: dict[str, tuple[str, Mangle]] = {
    "damaged header": ("checksum", lambda f: _with(f, kv_at(f)[0], _flip(f[kv_at(f)[0]], 8))),
    "damaged body": ("checksum", lambda f: _with(f, kv_at(f)[4], _flip(f[kv_at(f)[4]], -9 % len(f[4])))),
    "cut frame": ("layout", lambda f: _with(f, kv_at(f)[2], f[kv_at(f)[2]][:-64])),
    "no bytes": ("layout", lambda f: _with(f, kv_at(f)[2], b"")),
    "doubled": ("duplicate", lambda f: [*f[:3], f[2], *f[3:]]),
    "lost": ("gap", lambda f: [*f[:3], *f[4:]]),
    "lost at the end": ("incomplete", lambda f: [*f[:-2], f[-1]]),
    "in another order": ("gap", lambda f: _swapped(f, 0, 3)),
    "of another attempt": ("fence", lambda f: _with(f, 1, change(f[1], attempt=7))),
    "of another request": ("fence", lambda f: _with(f, 1, change(f[1], request_id="other"))),
    "of an older pull": ("fence", lambda f: _with(f, 1, change(f[1], transfer=9))),
    "of another layer": ("duplicate", lambda f: _with(f, 1, move(f[1], layer_idx=0))),
    "of no layer": ("layer", lambda f: _with(f, 1, move(f[1], layer_idx=3))),
    "another length": ("rows", lambda f: _with(f, 1, change(f[1], num_rows=15))),
    "overlapping": ("duplicate", lambda f: _with(f, 3, change(f[3], first_token_idx=15))),
    "the token early": ("incomplete", lambda f: [*f[:2], f[-1], *f[2:]]),
    "no token": ("truncated", lambda f: f[:-1]),
    "nothing": ("truncated", lambda f: f[:0]),
}


def refused(cluster: Cluster) -> dict[str, float]:
    """Frames that the decode worker refused, by reason."""
    samples = cluster.attention["decode-0"].server.metrics.registry.collect()
    return {
        sample.labels["reason"]: sample.value
        for metric in samples
        for sample in metric.samples
        if sample.name == "moray_attention_kv_refused_total"
    }


OTHER_REASONS = {"another length": "checksum", "in another order": "unread"}
"""Of rows that are read: as many as the header says, from an agent that the first frame introduces."""


@pytest.mark.parametrize(
    ("num_lies", "transport"),
    [(1, "grpc"), (2, "grpc"), pytest.param(1, "nixl", marks=needs_nixl)],
    ids=["once", "always", "once, over nixl"],
)
@pytest.mark.parametrize("lie", LIES)
def test_wrong_frames_are_refused_and_the_text_is_right(lie: str, num_lies: int, transport: str) -> None:
    """Asked for again under the next fence, in plain frames; computed here when that lies too."""
    reason, mangle = LIES[lie]
    if transport == "nixl":
        reason = OTHER_REASONS.get(lie, reason)

    async def main() -> None:
        async with (
            open_cluster(num_experts=1, attention=workers(transport)) as cluster,
            lying_prefill(cluster, mangle, num_lies=num_lies) as prefill,
        ):
            text = cluster.generate(
                GOLDEN.prompt, prefill="", prefill_address=prefill.address, max_tokens=len(TEXT)
            )
            assert await asyncio.wait_for(text, HANG_S) == TEXT
            assert prefill.transfers == [0, 1]
            # The second time its pages are cached, and their rows come first, in other frames.
            assert sum(refused(cluster).values()) == num_lies
            assert refused(cluster)[reason] >= 1
            result = "received" if num_lies == 1 else "local"
            assert cluster.metric("decode-0", "kv_transfers_total", result=result) == 1
            computed = len(GOLDEN.prompt) if num_lies == 2 else 0
            assert cluster.metric("decode-0", "tokens_total", phase="prefill") == computed

    run_test(main())


def test_prefill_worker_is_told_what_is_left_of_the_deadline() -> None:
    """The second pull, after a whole prefill, has less time than the first one."""

    async def main() -> None:
        async with (
            open_cluster(num_experts=1, attention=WORKERS) as cluster,
            lying_prefill(cluster, lambda f: f[:-1]) as prefill,
        ):
            await cluster.generate(
                GOLDEN.prompt, prefill="", prefill_address=prefill.address, deadline_ms=90_000
            )
            first_ms, second_ms = prefill.deadlines_ms
            assert 0 < second_ms < first_ms < 90_000

    run_test(main())


def test_what_comes_behind_the_first_token_is_not_read() -> None:
    async def main() -> None:
        async with (
            open_cluster(num_experts=1, attention=WORKERS) as cluster,
            lying_prefill(cluster, lambda f: [*f, f[0], f[-1]]) as prefill,
        ):
            text = await cluster.generate(
                GOLDEN.prompt, prefill="", prefill_address=prefill.address, max_tokens=len(TEXT)
            )
            assert text == TEXT
            assert refused(cluster) == {}

    run_test(main())


@pytest.mark.parametrize("num_frames", [0, 4, 9])
def test_prefill_worker_that_stalls_is_given_up_after_the_lease(num_frames: int) -> None:
    """The router hears of a lost worker; the pages are free, and the open call is ended."""

    async def main() -> None:
        async with (
            open_cluster(num_experts=1, attention=IMPATIENT) as cluster,
            lying_prefill(cluster, lambda f: f[:num_frames], is_stalling=True) as prefill,
        ):
            began_s = time.monotonic()
            call = cluster.open_generate(GOLDEN.prompt, prefill="", prefill_address=prefill.address)
            with pytest.raises(WorkerLost, match=r"gave no sign for 0\.5 s"):
                await drain(call)
            assert time.monotonic() - began_s < LEASE_S + HANG_S
            await cluster.is_empty()
            await until(lambda: prefill.num_ended == 1)
            assert cluster.metric("decode-0", "kv_transfers_total", result="lost") == 1
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)) == TEXT

    run_test(main())


def test_prefill_that_waits_for_its_turn_is_not_given_up() -> None:
    """The engine of the prefill worker is busy with others for more than two leases."""

    async def main() -> None:
        attention = {"prefill-0": {"lease_s": LEASE_S}, "decode-0": {"lease_s": LEASE_S}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            is_free = threading.Event()
            cluster.attention["prefill-0"].server._engine._commands.put(is_free.wait)
            began_s = time.monotonic()
            call = asyncio.create_task(cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)))
            await until(lambda: time.monotonic() - began_s > 2 * LEASE_S)
            assert cluster.metric("prefill-0", "kv_bytes_total", direction="sent") > 0
            assert not call.done()
            is_free.set()
            assert await call == TEXT

    run_test(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_cached", [16, 40])
def test_only_rows_that_the_decode_worker_does_not_hold_are_sent(num_cached: int, transport: str) -> None:
    """A page is 4 tokens; the text is that of a worker that holds nothing."""

    async def main() -> None:
        async with open_cluster(num_experts=1, attention=workers(transport)) as cluster:
            await cluster.generate(GOLDEN.prompt[:num_cached], max_tokens=1)
            received = cluster.metric("decode-0", "kv_bytes_total", direction="received")
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(TEXT)) == TEXT
            sent = cluster.metric("decode-0", "kv_bytes_total", direction="received") - received
            assert sent * num_cached == received * (len(GOLDEN.prompt) - num_cached)
            assert refused(cluster) == {}

    run_test(main())


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_newer_pull_of_an_attempt_ends_the_older() -> None:
    """A decode worker that asks again needs not wait until the prefill worker noticed that it hung up."""

    async def main() -> None:
        async with open_cluster(num_experts=1, attention={"prefill-0": {"max_step_tokens": 1}}) as cluster:
            prefill = cluster.channel(cluster.attention["prefill-0"]).unary_stream(
                PREFILL_METHOD, request_serializer=attention_pb2.SequenceRequest.SerializeToString
            )

            def pull(transfer: int) -> Any:
                request = attention_pb2.SequenceRequest(
                    request_id="r", token_ids=GOLDEN.prompt * 5, max_tokens=1, transfer=transfer
                )
                return prefill(request, metadata=cluster.handshake.to_metadata())

            old = pull(0)
            await old.read()
            new = pull(1)
            assert [await new.read()]
            with pytest.raises(grpc.aio.AioRpcError, match="pull 1 took over"):
                await _read_all(old)
            await _read_all(new)
            assert cluster.metric("prefill-0", "kv_transfers_total", result="superseded") == 1
            assert cluster.metric("prefill-0", "kv_transfers_total", result="sent") == 1

    run_test(main())
