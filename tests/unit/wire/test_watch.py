"""The table stream's client, with the network taken out: keeps the last snapshot, tells every one."""

import asyncio

import grpc

from wire.proto import control_pb2
from wire.watch import ClusterWatch


class FakeStub:
    def __init__(self, versions, fails):
        self.versions = versions
        self.fails = fails
        self.asked = []

    def Watch(self, request, wait_for_ready):
        self.asked.append((request.member_id, wait_for_ready))
        return self._stream()

    async def _stream(self):
        for version in self.versions:
            yield control_pb2.ClusterSnapshot(version=version)
        if self.fails:
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata)


def test_lost_controller_leaves_the_last_snapshot(caplog):
    seen = []
    watch = ClusterWatch(
        "nowhere:1", member_id="me", on_snapshot=lambda snapshot: seen.append(snapshot.version)
    )
    stub = FakeStub([1, 2], fails=True)
    asyncio.run(watch._follow(stub))
    assert seen == [1, 2]
    assert watch.snapshot.version == 2
    assert stub.asked == [("me", True)]
    assert "lost the controller at nowhere:1" in caplog.text
