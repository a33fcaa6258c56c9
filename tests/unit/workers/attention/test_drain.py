"""The door of a worker that leaves."""

import asyncio

import pytest

from wire.errors import MorayError, NotReady, WorkerLost
from workers.attention.drain import Door
from workers.attention.types import Source


def nobody(error: MorayError) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize(
    ("source", "error_class"),
    [(Source.LOCAL, NotReady), (Source.REMOTE, NotReady), (Source.PREFILL_ONLY, WorkerLost)],
)
def test_closed_door_refuses_with_an_error_that_blames_the_right_worker(
    source: Source, error_class: type[MorayError]
) -> None:
    door = Door("decode-0")
    door.close()
    with pytest.raises(error_class, match="decode-0") as caught, door.enter(source, nobody):
        pass
    assert caught.value.is_retryable
    assert door.num_inside == 0


def test_who_is_inside_stays_until_sent_away() -> None:
    door = Door("decode-0")
    told: list[MorayError] = []
    with door.enter(Source.REMOTE, told.append), door.enter(Source.PREFILL_ONLY, told.append):
        door.close()
        assert told == []
        assert door.send_away() == 2
    assert [type(error) for error in told] == [NotReady, WorkerLost]
    assert door.num_inside == 0


def test_empty_is_when_the_last_call_ended() -> None:
    async def main() -> None:
        door = Door("decode-0")
        assert await door.wait_empty(0)
        with door.enter(Source.LOCAL, nobody):
            with door.enter(Source.LOCAL, nobody):
                assert not await door.wait_empty(0)
            assert not await door.wait_empty(0)
        assert await door.wait_empty(0)

    asyncio.run(main())
