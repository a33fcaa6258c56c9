"""Waiting for the cluster."""

import asyncio

import pytest

from router.requests.roster import Roster
from wire.errors import NotReady
from wire.proto import control_pb2


def snapshot(version, *, is_ready):
    worker = control_pb2.Member(
        worker_id="b", role=control_pb2.ROLE_BOTH, address="b:1", is_ready=is_ready, incarnation=1
    )
    return control_pb2.ClusterSnapshot(
        version=version,
        model=control_pb2.ModelInfo(name="toy"),
        table=control_pb2.RoutingTable(version=1),
        members=[worker],
    )


def test_waiter_wakes_on_the_snapshot_that_is_enough():
    async def main():
        roster = Roster()
        waiter = asyncio.ensure_future(roster.wait_ready(60))
        await asyncio.sleep(0)
        roster.update(snapshot(1, is_ready=False))
        await asyncio.sleep(0)
        assert not waiter.done()
        roster.update(snapshot(2, is_ready=True))
        return await waiter

    assert asyncio.run(main()).version == 2


def test_waiting_in_vain_says_for_what():
    async def main():
        roster = Roster()
        roster.update(snapshot(1, is_ready=False))
        with pytest.raises(NotReady, match="a decode worker"):
            await roster.wait_ready(0.001)

    asyncio.run(main())


def test_no_time_to_wait_still_sees_what_is_there():
    async def main():
        roster = Roster()
        roster.update(snapshot(3, is_ready=True))
        return await roster.wait_ready(0)

    assert asyncio.run(main()).version == 3
