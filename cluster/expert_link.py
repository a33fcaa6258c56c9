"""The controller's line to one expert worker: what it holds, what it is to load, whether it lives."""

import grpc.aio

from cluster.control.tables import LoadOrder
from wire.errors import from_rpc
from wire.handshake import Handshake
from wire.proto import expert_pb2, expert_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS
from workers.expert.types import slots_to_proto


class ExpertLink:
    """One channel to one process; every method raises the MorayError behind a failed call."""

    def __init__(self, address: str, handshake: Handshake) -> None:
        self._metadata = handshake.to_metadata()
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: expert_pb2_grpc.ExpertAsyncStub = expert_pb2_grpc.ExpertStub(self._channel)

    async def describe(self) -> expert_pb2.SlotReport:
        """What the worker holds; waits until it listens."""
        try:
            return await self._stub.Describe(
                expert_pb2.DescribeRequest(), metadata=self._metadata, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    async def load(self, order: LoadOrder) -> None:
        """Returns when the worker holds what it was ordered to."""
        request = expert_pb2.LoadSlotsRequest(
            table_version=order.table_version, slots=slots_to_proto(order.slots)
        )
        try:
            await self._stub.LoadSlots(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    async def beat(self, scale: expert_pb2.Scale, *, deadline_s: float) -> expert_pb2.BeatReport:
        """The rows counted since the last beat; fails when no answer comes in time."""
        try:
            return await self._stub.Beat(
                expert_pb2.BeatRequest(scale=scale), metadata=self._metadata, timeout=deadline_s
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    async def close(self) -> None:
        """Ends the channel and every call on it."""
        await self._channel.close()
