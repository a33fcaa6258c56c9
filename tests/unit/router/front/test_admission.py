"""Who comes in, and how those inside are sent away."""

import asyncio

import pytest

from router.front.admission import Admission
from wire.errors import NotReady, Overloaded


async def stay(admission, entered, leave):
    with admission.enter():
        entered.set()
        await leave.wait()


async def start(admission, leave):
    entered = asyncio.Event()
    task = asyncio.ensure_future(stay(admission, entered, leave))
    await entered.wait()
    return task


def test_limit_is_kept_and_a_place_is_given_back():
    async def main():
        admission, leave = Admission(max_active_requests=1), asyncio.Event()
        task = await start(admission, leave)
        with pytest.raises(Overloaded, match="holds 1 requests"), admission.enter():
            pass
        leave.set()
        await task
        with admission.enter():
            assert admission.num_active == 1
        assert admission.num_active == 0

    asyncio.run(main())


def test_closed_door_lets_nobody_in_and_those_inside_finish():
    async def main():
        admission, leave = Admission(max_active_requests=9), asyncio.Event()
        task = await start(admission, leave)
        admission.close()
        with pytest.raises(NotReady, match="shutting down"), admission.enter():
            pass
        assert not await admission.wait_idle(0.001)
        leave.set()
        assert await admission.wait_idle(10)
        await task

    asyncio.run(main())


def test_request_that_is_cut_ends_as_not_ready():
    async def main():
        admission = Admission(max_active_requests=9)
        task = await start(admission, asyncio.Event())
        admission.cut_all()
        with pytest.raises(NotReady, match="shutting down"):
            await task
        assert admission.num_active == 0

    asyncio.run(main())


def test_request_that_its_client_cancels_stays_cancelled():
    async def main():
        admission = Admission(max_active_requests=9)
        task = await start(admission, asyncio.Event())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await admission.wait_idle(10)

    asyncio.run(main())
