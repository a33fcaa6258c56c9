"""The book of open calls: answers find their futures, errors all of them, and nothing is answered twice."""

import pytest

from router.experts.open_calls import OpenCalls, read_error
from wire.errors import (
    ExpertNotLoaded,
    FrameInvalid,
    HandshakeRefused,
    InternalError,
    MorayError,
    Overloaded,
    RequestCancelled,
    StaleTable,
    WorkerLost,
)
from wire.frames import Frame, FrameKind


def partial(call_id: int) -> Frame:
    return Frame(kind=FrameKind.PARTIAL, call_id=call_id)


def test_answer_resolves_its_own_call_only() -> None:
    calls = OpenCalls("w")
    (first, waiting), (second, answered) = calls.open(), calls.open()
    assert first != second
    calls.resolve(partial(second))
    assert answered.result(timeout=0).call_id == second
    assert not waiting.done()


@pytest.mark.parametrize("how_often", [1, 2])
def test_answer_to_a_call_that_is_not_open_is_refused(how_often: int) -> None:
    calls = OpenCalls("w")
    call_id, _ = calls.open()
    if how_often == 2:
        calls.resolve(partial(call_id))
    with pytest.raises(FrameInvalid, match="not open") as caught:
        calls.resolve(partial(call_id if how_often == 2 else call_id + 1))
    assert caught.value.field == "call"


def test_error_frame_is_raised_as_what_the_worker_raised() -> None:
    calls = OpenCalls("w")
    call_id, future = calls.open()
    calls.resolve(Frame(kind=FrameKind.ERROR, call_id=call_id, meta=b"ExpertNotLoaded: layer 3: [7]"))
    error = future.exception(timeout=0)
    assert isinstance(error, ExpertNotLoaded)
    assert error.message == "layer 3: [7]"


@pytest.mark.parametrize("text", ["", "what?", "Unheard: of"])
def test_unknown_error_is_an_internal_one(text: str) -> None:
    assert type(read_error(text)) is InternalError


@pytest.mark.parametrize(
    ("error", "told", "told_later"),
    [
        (WorkerLost("x"), WorkerLost, WorkerLost),
        (StaleTable("x"), WorkerLost, WorkerLost),
        (RequestCancelled("x"), WorkerLost, WorkerLost),
        (FrameInvalid("x"), FrameInvalid, WorkerLost),
        (HandshakeRefused("x"), HandshakeRefused, HandshakeRefused),
    ],
)
def test_failed_stream_fails_every_call_now_and_later(
    error: MorayError, told: type[MorayError], told_later: type[MorayError]
) -> None:
    calls = OpenCalls("w")
    futures = [calls.open()[1] for _ in range(3)]
    assert calls.fail(error) == 3
    assert [type(future.exception(timeout=0)) for future in futures] == [told] * 3
    assert calls.is_broken
    assert isinstance(calls.open()[1].exception(timeout=0), told_later)
    assert calls.fail(error) == 0


def test_refusal_before_the_first_call_is_what_that_call_is_told() -> None:
    calls = OpenCalls("w")
    assert calls.fail(HandshakeRefused("another model")) == 0
    calls.fail(WorkerLost("and then it was gone"))
    assert str(calls.open()[1].exception(timeout=0)) == "another model"


def test_refused_call_is_closed_and_the_others_stay_open() -> None:
    calls = OpenCalls("w")
    (call_id, refused), (_, waiting) = calls.open(), calls.open()
    calls.refuse(call_id, Overloaded("full"))
    calls.refuse(call_id, Overloaded("again"))
    assert str(refused.exception(timeout=0)) == "full"
    assert not waiting.done()
