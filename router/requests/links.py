"""The router's channels to attention workers: one per worker process, closed when it leaves the cluster."""

import asyncio
from typing import TYPE_CHECKING

import grpc.aio

from router.requests.members import ClusterView, Worker
from wire.proto import attention_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from wire.proto.attention_pb2_grpc import AttentionAsyncStub


class WorkerLinks:
    """Channels by worker key and address. A call on a closed channel ends cancelled."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """Channels that are open."""
        return len(self._channels)

    def stub(self, worker: Worker) -> "AttentionAsyncStub":
        """The stub of a worker, on its one channel."""
        name = (worker.key, worker.address)
        if name not in self._channels:
            self._channels[name] = grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS)
        return attention_pb2_grpc.AttentionStub(self._channels[name])

    def drop_absent(self, view: ClusterView) -> None:
        """Closes the channels of workers that the snapshot no longer has; their calls end at once."""
        for name in [name for name in self._channels if name[0] not in view.present]:
            self._close_soon(self._channels.pop(name))

    async def close(self) -> None:
        """Closes every channel and waits until they are closed."""
        for name in list(self._channels):
            self._close_soon(self._channels.pop(name))
        await asyncio.gather(*self._closing.values())

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(channel.close(None))
        self._closing[id(task)] = task
        task.add_done_callback(lambda done: self._closing.pop(id(done), None))
