"""The controller's table stream over real gRPC: who watches, who is slow, and who was away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.client import rebalance, scale, shut_down
from cluster.control_server import ControlServer, Rebalanced
from wire.errors import ConfigError, InternalError, InvalidRequest, NotReady, WorkerLost
from wire.metrics import Metrics
from wire.proto import control_pb2, control_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS
from wire.watch import ClusterWatch

TEST_S = 60
BIG_TEXT = "x" * 1_000_000
"""Larger than what gRPC buffers for a watcher that does not read."""


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, TEST_S))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what is waited for has no event of its own
        await asyncio.sleep(0.01)


def snapshot(version: int, text: str = "") -> control_pb2.ClusterSnapshot:
    return control_pb2.ClusterSnapshot(version=version, waiting_for=text)


class Controller:
    """A control server that notes what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.metrics = Metrics("controller")
        self.num_shutdowns = 0
        self.error = error
        self.reports: list[control_pb2.ReportRequest] = []
        self.scaled: list[tuple[str, int]] = []
        self.roles: dict[str, str] = {}
        self.server = ControlServer(self, metrics=self.metrics)
        self.address = ""

    async def on_report(self, report: control_pb2.ReportRequest) -> None:
        self.reports.append(report)

    async def scale(self, role: str, num_workers: int) -> int:
        self.scaled.append((role, num_workers))
        if num_workers == 0:
            raise ConfigError(field=f"{role}.replicas", wanted="at least 1", given="0")
        return 7

    async def set_role(self, worker_id: str, role: str) -> int:
        self.roles[worker_id] = role
        return 9

    async def drain(self, node: str) -> list[str]:
        return [f"decode-0 of {node}"]

    async def rebalance(self, *, force: bool, seed: int) -> Rebalanced:
        return Rebalanced(table_version=seed, num_moved=int(force))

    async def shutdown(self) -> None:
        self.num_shutdowns += 1
        if self.error is not None:
            raise self.error

    async def start(self, port: int = 0) -> None:
        self.address = f"127.0.0.1:{await self.server.start(f'127.0.0.1:{port}')}"

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def gauge(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"moray_controller_{name}")


@contextlib.asynccontextmanager
async def controller(*, port: int = 0, error: Exception | None = None) -> AsyncIterator[Controller]:
    made = Controller(error)
    await made.start(port)
    try:
        yield made
    finally:
        await made.server.stop()


@contextlib.asynccontextmanager
async def watch(address: str) -> AsyncIterator[Any]:
    """An open stream of snapshots."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = control_pb2_grpc.ControlStub(channel).Watch(control_pb2.WatchRequest(member_id="me"))
        try:
            yield call
        finally:
            call.cancel()


@contextlib.asynccontextmanager
async def following(address: str) -> AsyncIterator[tuple[ClusterWatch, list[int]]]:
    """A running ClusterWatch and the versions that it was told."""
    seen: list[int] = []
    watcher = ClusterWatch(
        address, member_id="me", on_snapshot=lambda new: seen.append(new.version), retry_s=0.02
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield watcher, seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_watcher_gets_the_newest_at_once_then_each_newer_one() -> None:
    async def test() -> None:
        async with controller() as control:
            await control.server.publish(snapshot(1))
            await control.server.publish(snapshot(2))
            async with watch(control.address) as stream:
                assert (await stream.read()).version == 2
                for version in (3, 4):
                    await control.server.publish(snapshot(version))
                    assert (await stream.read()).version == version

    run(test())


def test_watcher_from_before_the_first_snapshot_gets_it() -> None:
    async def test() -> None:
        async with controller() as control, watch(control.address) as stream:
            await until(lambda: control.gauge("watchers") == 1)
            await control.server.publish(snapshot(1, "expert-0"))
            assert await stream.read() == snapshot(1, "expert-0")

    run(test())


def test_snapshot_that_is_not_newer_is_not_sent() -> None:
    async def test() -> None:
        async with controller() as control, watch(control.address) as stream:
            await control.server.publish(snapshot(5))
            assert (await stream.read()).version == 5
            for version in (5, 4):
                await control.server.publish(snapshot(version))
                await asyncio.sleep(0.05)
            await control.server.publish(snapshot(6))
            assert (await stream.read()).version == 6

    run(test())


def test_slow_watcher_skips_to_the_newest_and_holds_nobody_up() -> None:
    async def test() -> None:
        async with controller() as control, watch(control.address) as slow, watch(control.address) as fast:
            for version in range(1, 41):
                await control.server.publish(snapshot(version, BIG_TEXT))
                assert (await fast.read()).version == version
            versions = [(await slow.read()).version]
            while versions[-1] < 40:
                versions.append((await slow.read()).version)
            assert versions == sorted(set(versions))
            assert len(versions) < 40

    run(test())


def test_every_watcher_gets_every_snapshot_that_it_waits_for() -> None:
    async def test() -> None:
        async with controller() as control, contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(watch(control.address)) for _ in range(20)]
            for version in (1, 2, 3):
                await control.server.publish(snapshot(version))
                received = await asyncio.gather(*(stream.read() for stream in streams))
                assert [got.version for got in received] == [version] * 20
            assert control.gauge("watchers") == 20

    run(test())


def test_watchers_are_counted_down_when_they_leave() -> None:
    async def test() -> None:
        async with controller() as control:
            await control.server.publish(snapshot(1))
            async with watch(control.address) as stays:
                await stays.read()
                async with watch(control.address) as leaves:
                    await leaves.read()
                    assert control.gauge("watchers") == 2
                await until(lambda: control.gauge("watchers") == 1)
            await until(lambda: control.gauge("watchers") == 0)

    run(test())


def test_published_version_is_a_metric() -> None:
    async def test() -> None:
        async with controller() as control:
            await control.server.publish(snapshot(7))
            assert control.gauge("snapshot_version") == 7

    run(test())


def test_shutdown_calls_back_once_and_answers() -> None:
    async def test() -> None:
        async with controller() as control:
            await shut_down(control.address, deadline_s=TEST_S)
            assert control.num_shutdowns == 1

    run(test())


@pytest.mark.parametrize(
    ("error", "wanted"),
    [(WorkerLost("expert-0 does not end"), WorkerLost), (ValueError("oops"), InternalError)],
)
def test_shutdown_that_fails_says_why(error: Exception, wanted: type[Exception]) -> None:
    async def test() -> None:
        async with controller(error=error) as control:
            with pytest.raises(wanted, match=str(error)):
                await shut_down(control.address, deadline_s=TEST_S)

    run(test())


def test_report_reaches_the_controller() -> None:
    async def test() -> None:
        async with controller() as control, grpc.aio.insecure_channel(control.address) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            report = control_pb2.ReportRequest(member_id="decode-0", table_version=7, trouble="t")
            await stub.Report(report)
            assert control.reports == [report]

    run(test())


def test_scale_reaches_the_controller_by_the_roles_name() -> None:
    async def test() -> None:
        async with controller() as control:
            version = await scale(control.address, control_pb2.ROLE_EXPERT, 3, deadline_s=TEST_S)
            assert (version, control.scaled) == (7, [("expert", 3)])

    run(test())


@pytest.mark.parametrize(
    ("role", "num_workers", "error"),
    [(control_pb2.ROLE_DECODE, 0, ConfigError), (control_pb2.ROLE_ROUTER, 2, InvalidRequest)],
)
def test_scale_that_cannot_be_says_why(role: Any, num_workers: int, error: type[Exception]) -> None:
    async def test() -> None:
        async with controller() as control:
            with pytest.raises(error, match=r"wanted"):
                await scale(control.address, role, num_workers, deadline_s=TEST_S)

    run(test())


def test_rebalance_reaches_the_controller() -> None:
    async def test() -> None:
        async with controller() as control:
            request = control_pb2.RebalanceRequest(force=True, seed=5)
            done = await rebalance(control.address, request, deadline_s=TEST_S)
            assert (done.table_version, done.num_moved) == (5, 1)

    run(test())


def test_nobody_to_scale_is_an_error_that_says_where() -> None:
    async def test() -> None:
        async with controller() as control:
            gone = control.address
        with pytest.raises(NotReady, match=gone):
            await scale(gone, control_pb2.ROLE_EXPERT, 3, deadline_s=TEST_S)

    run(test())


def test_port_that_is_taken_is_an_error() -> None:
    async def test() -> None:
        async with controller() as control:
            with pytest.raises(RuntimeError, match="bind"):
                await Controller().start(control.port)

    run(test())


def test_stop_ends_every_stream_and_frees_the_port() -> None:
    async def test() -> None:
        async with controller() as control, watch(control.address) as stream:
            await control.server.publish(snapshot(1))
            await stream.read()
            await control.server.stop()
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()
            await until(lambda: control.gauge("watchers") == 0)
            async with controller(port=control.port):
                pass

    run(test())


def test_stop_before_start_is_no_error() -> None:
    run(Controller().server.stop())


def test_cluster_watch_keeps_the_last_snapshot_and_finds_the_restarted_controller() -> None:
    async def test() -> None:
        async with controller() as first, following(first.address) as (watcher, seen):
            await first.server.publish(snapshot(8))
            await until(lambda: seen == [8])
            await first.server.stop()
            await asyncio.sleep(0.1)
            assert watcher.snapshot == snapshot(8)
            async with controller(port=first.port) as second:
                await until(lambda: second.gauge("watchers") == 1)
                assert watcher.snapshot == snapshot(8)
                await second.server.publish(snapshot(1, "everybody"))
                await until(lambda: seen == [8, 1])
                assert watcher.snapshot == snapshot(1, "everybody")

    run(test())


def test_cluster_watch_waits_for_a_controller_that_starts_later() -> None:
    async def test() -> None:
        async with controller() as first:
            port = first.port
        async with following(f"127.0.0.1:{port}") as (watcher, seen):
            await asyncio.sleep(0.1)
            assert watcher.snapshot is None
            async with controller(port=port) as control:
                await control.server.publish(snapshot(1))
                await until(lambda: seen == [1])

    run(test())


def test_cancelled_cluster_watch_leaves_the_controller() -> None:
    async def test() -> None:
        async with controller() as control:
            await control.server.publish(snapshot(1))
            async with following(control.address) as (_, seen):
                await until(lambda: seen == [1])
            await until(lambda: control.gauge("watchers") == 0)

    run(test())
