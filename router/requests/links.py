"""The router's channels to attention workers: one per worker process, closed when it leaves the cluster."""

import asyncio

import grpc.aio

from router.requests.feed import EventFeed
from router.requests.members import ClusterView, Worker
from wire.handshake import Handshake
from wire.proto import attention_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS


class WorkerLink:
    """What the router has open to one worker."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub: attention_pb2_grpc.AttentionAsyncStub = attention_pb2_grpc.AttentionStub(self._channel)
        self._feed: EventFeed | None = None

    def feed(self, handshake: Handshake) -> EventFeed:
        """The stream that brings the events of all sequences; a new one where the last has ended."""
        if self._feed is None or self._feed.has_ended:
            self._feed = EventFeed(self.stub, handshake)
        return self._feed

    async def close(self) -> None:
        """Ends every call."""
        await self._channel.close(None)
        if self._feed is not None:
            await self._feed.close()


class WorkerLinks:
    """Links by worker key and address. A call on a closed one ends cancelled."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], WorkerLink] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """Links that are open."""
        return len(self._links)

    def find(self, worker: Worker) -> WorkerLink:
        """The one link to a worker."""
        name = (worker.key, worker.address)
        if name not in self._links:
            self._links[name] = WorkerLink(worker.address)
        return self._links[name]

    def drop_absent(self, view: ClusterView) -> None:
        """Closes the links of workers that the snapshot no longer has; their calls end at once."""
        for name in [name for name in self._links if name[0] not in view.present]:
            self._close_soon(self._links.pop(name))

    async def close(self) -> None:
        """Closes every link and waits until they are closed."""
        for name in list(self._links):
            self._close_soon(self._links.pop(name))
        await asyncio.gather(*self._closing.values())

    def _close_soon(self, link: WorkerLink) -> None:
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing[id(task)] = task
        task.add_done_callback(lambda done: self._closing.pop(id(done), None))
