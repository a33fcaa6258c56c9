"""A prefill worker whose process is gone in the middle of a transfer, as after kill -9."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from cluster.client import GenerateOptions, InferenceClient
from router.config import RouterConfig
from router.front.service import RouterService
from tests.integration.workers.lab import HOST, Cluster, open_cluster, run_test, until
from wire.proto import control_pb2

PROMPT = [3 + i % 300 for i in range(400)]
OPTIONS = GenerateOptions(max_tokens=12, ignore_eos=True)
TWO_PREFILLS = {
    "prefill-0": {"max_step_tokens": 1},
    "prefill-1": {},
    # A lease that nobody waits for: the broken connection tells.
    "decode-0": {"lease_s": 60.0},
}


@dataclass
class Cable:
    """Carries bytes between callers and a server, until it is cut: then nothing listens at its address."""

    target: str
    address: str = ""
    _ends: list[asyncio.StreamWriter] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def lay(self) -> None:
        self._server = await asyncio.start_server(self._connect, HOST)
        self.address = f"{HOST}:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self) -> None:
        """What the kernel does to the connections of a process that is killed."""
        self._server.close()
        for end in self._ends:
            end.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self.target.split(":"))
        self._ends += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(_carry(source, sink)))


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        sink.close()


def tell_router(cluster: Cluster, addresses: dict[str, str]) -> None:
    """The next snapshot: these prefill workers, where they are said to be, and the decode worker."""
    config = cluster.config
    model = control_pb2.ModelInfo(
        name="m",
        fingerprint=cluster.handshake.model,
        vocab_tokens=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
    )
    members = [
        control_pb2.Member(
            worker_id=name,
            role=control_pb2.ROLE_DECODE if name.startswith("decode") else control_pb2.ROLE_PREFILL,
            address=address,
            is_ready=True,
            num_pages=256,
        )
        for name, address in {**addresses, "decode-0": cluster.attention["decode-0"].address}.items()
    ]
    old = cluster.controller.snapshot
    experts = [member for member in old.members if member.role == control_pb2.ROLE_EXPERT]
    cluster.controller.push(
        control_pb2.ClusterSnapshot(
            model=model, members=[*members, *experts], table=old.table, page_tokens=old.page_tokens
        )
    )


@contextlib.asynccontextmanager
async def open_router(cluster: Cluster) -> AsyncIterator[RouterService]:
    config = RouterConfig(grpc_port=0, http_port=0)
    router = RouterService(config, controller_address=cluster.controller.address)
    await router.start()
    try:
        yield router
    finally:
        await router.stop()


def test_prefill_worker_that_is_killed_in_the_middle_of_a_transfer_changes_no_token() -> None:
    """The decode worker says so at once and frees the pages; the router sends the prompt elsewhere."""

    async def main() -> None:
        async with open_cluster(num_experts=1, attention=TWO_PREFILLS) as cluster:
            expected = await cluster.generate(PROMPT, at="prefill-1", prefill="", max_tokens=12)
            cable = Cable(cluster.attention["prefill-0"].address)
            await cable.lay()
            tell_router(cluster, {"prefill-0": cable.address})
            async with (
                open_router(cluster) as router,
                InferenceClient(f"{HOST}:{router.grpc_port}") as client,
            ):
                text = asyncio.create_task(client.tokens(PROMPT, OPTIONS))
                await until(lambda: cluster.metric("decode-0", "kv_bytes_total", direction="received") > 0)
                tell_router(
                    cluster, {"prefill-0": cable.address, "prefill-1": cluster.attention["prefill-1"].address}
                )
                await cable.cut()
                assert await text == expected
                router.ledger.check_integrity()
                assert router.ledger.loads == {}
            assert cluster.metric("decode-0", "kv_transfers_total", result="failed") == 1
            assert cluster.metric("prefill-0", "tokens_total", phase="prefill") < len(PROMPT)
            await cluster.is_empty()

    run_test(main())
