"""A router between a fake controller and fake attention workers, all over real gRPC on loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from router.config import RouterConfig
from router.front.service import RouterService
from wire.errors import MorayError
from wire.proto import (
    attention_pb2,
    attention_pb2_grpc,
    common_pb2,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from wire.rpc import SERVER_OPTIONS, abort_with

TEST_S = 60
VOCAB = 300
EOS = 1


def next_token(ids: tuple[int, ...]) -> int:
    """What the fake model says after `ids`: never the end token, and every token of the past matters."""
    return 2 + sum((idx + 1) * token_id for idx, token_id in enumerate(ids)) % (VOCAB - 2)


def expected_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(tuple(ids)))
    return ids[len(prompt) :]


Script = Callable[["FakeWorker", attention_pb2.SequenceRequest, Any], Awaitable[None]]


async def emit(request: attention_pb2.SequenceRequest, context: Any, *, limit: int | None = None) -> None:
    """Writes the fake model's tokens, one a message; all of them and the end mark, or `limit` and none."""
    ids = list(request.token_ids)
    for _ in range(request.max_tokens if limit is None else limit):
        ids.append(next_token(tuple(ids)))
        await context.write(attention_pb2.SequenceEvent(token_ids=ids[-1:]))
    if limit is None:
        await context.write(attention_pb2.SequenceEvent(finish_reason=common_pb2.FINISH_REASON_LENGTH))


async def answer(worker: "FakeWorker", request: attention_pb2.SequenceRequest, context: Any) -> None:
    await emit(request, context)


def hang_after(num_tokens: int) -> Script:
    async def script(worker: "FakeWorker", request: attention_pb2.SequenceRequest, context: Any) -> None:
        await emit(request, context, limit=num_tokens)
        worker.is_hanging.set()
        await worker.release.wait()
        rest = attention_pb2.SequenceRequest()
        rest.CopyFrom(request)
        ids = tuple(request.token_ids)
        rest.token_ids.extend(expected_tokens(ids, num_tokens))
        rest.max_tokens -= num_tokens
        await emit(rest, context)

    return script


def abort_after(num_tokens: int, error: MorayError, *, times: int = 1_000) -> Script:
    async def script(worker: "FakeWorker", request: attention_pb2.SequenceRequest, context: Any) -> None:
        if len(worker.requests) > times:
            await emit(request, context)
            return
        await emit(request, context, limit=num_tokens)
        await abort_with(context, error)

    return script


Feed = asyncio.Queue[attention_pb2.EventBatch | None]
"""What a Follow call is to send; None = its end."""


class FeedContext:
    """A call whose messages go through the stream that its request names."""

    def __init__(
        self,
        request: attention_pb2.SequenceRequest,
        context: Any,
        feed: Feed,
    ) -> None:
        self._number = request.sequence_number
        self._context = context
        self._feed = feed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, event: attention_pb2.SequenceEvent) -> None:
        numbered = attention_pb2.NumberedEvent(sequence_number=self._number, event=event)
        self._feed.put_nowait(attention_pb2.EventBatch(events=[numbered]))
        await asyncio.sleep(0)


@dataclass
class FakeWorker(attention_pb2_grpc.AttentionServicer):
    """An attention worker that follows a script."""

    worker_id: str
    role: int = control_pb2.ROLE_DECODE
    script: Script = answer
    requests: list[attention_pb2.SequenceRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    seconds_left: list[float | None] = field(default_factory=list)
    feeds: dict[str, Feed] = field(default_factory=dict)
    opens_streams: bool = True
    num_asked: int = 0
    """Streams that were asked for."""
    is_hanging: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    is_cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    incarnation: int = 1
    address: str = ""
    server: Any = None

    async def start(self) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        attention_pb2_grpc.add_AttentionServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    async def Generate(self, request: attention_pb2.SequenceRequest, context: Any) -> None:  # type: ignore[override]
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        try:
            await self.script(self, request, FeedContext(request, context, self.feeds[request.stream_id]))
        except asyncio.CancelledError:
            self.is_cancelled.set()
            raise

    async def Follow(self, request: attention_pb2.FollowRequest, context: Any) -> None:  # type: ignore[override]
        self.num_asked += 1
        if not self.opens_streams:
            await asyncio.Event().wait()
        feed = self.feeds[request.stream_id] = asyncio.Queue()
        feed.put_nowait(attention_pb2.EventBatch())
        try:
            while (batch := await feed.get()) is not None:
                await context.write(batch)
        finally:
            del self.feeds[request.stream_id]

    def member(self, *, is_ready: bool = True) -> control_pb2.Member:
        return control_pb2.Member(
            worker_id=self.worker_id,
            role=self.role,
            address=self.address,
            metrics_address=f"127.0.0.1:9{self.worker_id[-1]}",
            node=control_pb2.NodeInfo(node_id="node-a", zone="zone-1"),
            incarnation=self.incarnation,
            is_ready=is_ready,
            num_pages=100,
        )


def both(name: str, script: Script = answer) -> FakeWorker:
    """A worker that prefills and decodes."""
    return FakeWorker(name, control_pb2.ROLE_BOTH, script)


class FakeController(control_pb2_grpc.ControlServicer):
    """Sends the snapshots that a test pushes."""

    def __init__(self) -> None:
        self.snapshot: control_pb2.ClusterSnapshot | None = None
        self.watchers: list[str] = []
        self._changed = asyncio.Event()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    def push(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        snapshot.version = (self.snapshot.version if self.snapshot else 0) + 1
        self.snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: control_pb2.WatchRequest, context: Any) -> None:  # type: ignore[override]
        self.watchers.append(request.member_id)
        while True:
            changed = self._changed
            if self.snapshot:
                await context.write(self.snapshot)
            await changed.wait()


def make_snapshot(
    *members: control_pb2.Member, path: str = "", context_tokens: int = 64
) -> control_pb2.ClusterSnapshot:
    model = control_pb2.ModelInfo(
        name="toy",
        path=path,
        fingerprint="f00d",
        vocab_tokens=VOCAB,
        max_context_tokens=context_tokens,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    return control_pb2.ClusterSnapshot(
        model=model, members=members, table=control_pb2.RoutingTable(version=1, num_experts=8), page_tokens=4
    )


class Lab:
    """What a test works with."""

    def __init__(self, workers: list[FakeWorker], config: dict[str, Any], path: str) -> None:
        values = {"grpc_port": 0, "http_port": 0, "ready_wait_s": 5.0, "drain_s": 5.0, **config}
        self.workers = {worker.worker_id: worker for worker in workers}
        self.controller = FakeController()
        self.config = RouterConfig(**values)
        self.path = path
        self.context_tokens = 64
        self.service: RouterService
        self.channel: grpc.aio.Channel
        self.stub: Any

    def __getitem__(self, worker_id: str) -> FakeWorker:
        return self.workers[worker_id]

    def push(self, *, without: tuple[str, ...] = (), not_ready: tuple[str, ...] = ()) -> None:
        members = [
            worker.member(is_ready=worker.worker_id not in not_ready)
            for worker in self.workers.values()
            if worker.worker_id not in without
        ]
        controller = control_pb2.Member(
            worker_id="controller", role=control_pb2.ROLE_CONTROLLER, metrics_address="127.0.0.1:9999"
        )
        snapshot = make_snapshot(controller, *members, path=self.path, context_tokens=self.context_tokens)
        self.controller.push(snapshot)

    async def pushed(self) -> None:
        """Waits until the router holds the newest snapshot."""
        wanted = self.controller.snapshot.version if self.controller.snapshot else 0
        await self.service.roster.wait_for(lambda view: view.version == wanted, timeout_s=10)

    def call(self, ids: tuple[int, ...] = (5, 6, 7), *, timeout: float | None = None, **fields: Any) -> Any:
        """An open Generate call."""
        return self.stub.Generate(self.request(ids, **fields), timeout=timeout)

    def request(self, ids: tuple[int, ...] = (5, 6, 7), **fields: Any) -> inference_pb2.GenerateRequest:
        if "text" not in fields:
            fields["tokens"] = inference_pb2.TokenIds(ids=ids)
        return inference_pb2.GenerateRequest(**fields)

    async def tokens(self, call: Any) -> list[int]:
        """Every token of a call; their numbering must have no gap and no overlap."""
        ids: list[int] = []
        async for response in call:
            assert response.first_idx == len(ids)
            ids.extend(response.token_ids)
        return ids

    async def drain_call(self, call: Any) -> None:
        """Reads a call that `read` began to its end."""
        while await call.read() is not grpc.aio.EOF:
            pass

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Gives the loop turns until `is_so`, for what no event tells; the test's own limit ends it."""
        while not is_so():  # noqa: ASYNC110 - it looks into the router, which has no event for this
            await asyncio.sleep(0.005)

    async def idle(self) -> None:
        await self.until(lambda: self.service.num_active == 0)

    async def active(self, num_requests: int) -> None:
        await self.until(lambda: self.service.num_active == num_requests)

    async def started(self, worker: FakeWorker) -> None:
        await self.until(lambda: bool(worker.requests))

    async def delivered(self, num_tokens: int) -> None:
        """Waits until the router has sent that many tokens on; what a dying server still held may be lost."""
        await self.until(lambda: self.metric("generated_tokens_total") >= num_tokens)

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(f"http://127.0.0.1:{self.service.http_port}{path}")

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"moray_router_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def open_lab(
    *workers: FakeWorker, path: str = "", push: bool = True, **config: Any
) -> AsyncIterator[Lab]:
    lab = Lab(list(workers) or [FakeWorker("p0", control_pb2.ROLE_PREFILL), FakeWorker("d0")], config, path)
    await lab.controller.start()
    for worker in lab.workers.values():
        await worker.start()
    lab.service = RouterService(lab.config, controller_address=lab.controller.address, name="router-7")
    await lab.service.start()
    lab.channel = grpc.aio.insecure_channel(f"127.0.0.1:{lab.service.grpc_port}")
    lab.stub = inference_pb2_grpc.InferenceStub(lab.channel)
    if push:
        lab.push()
        await lab.service.wait_ready(10)
    try:
        yield lab
    finally:
        await lab.channel.close()
        await lab.service.stop()
        await lab.controller.stop()
        for worker in lab.workers.values():
            await worker.stop()


def run_test(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test on a loop of its own; no task may outlive it."""

    async def guarded() -> None:
        await asyncio.wait_for(main, TEST_S)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:
            _, pending = await asyncio.wait(left, timeout=2)
            assert not pending

    asyncio.run(guarded())


@pytest.fixture
def kit() -> SimpleNamespace:
    """Everything above, for tests, which cannot import a conftest."""
    return SimpleNamespace(
        run=run_test,
        open_lab=open_lab,
        worker=FakeWorker,
        both=both,
        hang_after=hang_after,
        abort_after=abort_after,
        abort_with=abort_with,
        answer=answer,
        emit=emit,
        expected=expected_tokens,
    )
