"""Answers can be read from any token on, and are kept within limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.requests.answers import (
    AnswerLogs,
    AnswerShelf,
    KeptAnswer,
    ShelfLimits,
    advance,
    fingerprint_of,
    first_wanted,
)
from router.requests.types import TokenBatch
from wire.errors import InternalError, InvalidRequest
from wire.proto import common_pb2
from wire.proto.inference_pb2 import GenerateRequest, GenerateResponse, TokenIds

STOP = common_pb2.FINISH_REASON_STOP


def token(idx, token_id=7, text="", output=0):
    return GenerateResponse(request_id="r", first_idx=idx, token_ids=[token_id], text=text, output_idx=output)


def end(idx, text="", output=0):
    message = GenerateResponse(
        request_id="r", first_idx=idx, finish_reason=STOP, text=text, output_idx=output
    )
    message.usage.completion_tokens = idx
    return message


def log_of(num_tokens, *, is_whole=True):
    log = AnswerLogs("r")
    for idx in range(num_tokens):
        log.add(token(idx, idx + 10, chr(ord("a") + idx % 26)))
    if is_whole:
        log.add(end(num_tokens, "!"))
    return log


def kept(num_tokens, *, end_s=0.0):
    return KeptAnswer(fingerprint=b"f", log=log_of(num_tokens), end_s=end_s)


def read_all(log, positions):
    """What there is from there on, and where it ends."""
    messages = []
    while message := log.read(positions):
        messages.append(message)
        positions = advance(positions, message)
    return messages, positions


@given(num_tokens=st.integers(0, 600), data=st.data())
def test_reader_gets_every_token_from_where_it_starts_whenever_it_reads(num_tokens, data):
    start = data.draw(st.integers(0, num_tokens))
    log, ids, text, positions, messages = AnswerLogs("r"), [], "", (start,), []
    for message in [*(token(idx, idx + 10, "x") for idx in range(num_tokens)), end(num_tokens, "!")]:
        log.add(message)
        while data.draw(st.booleans()) and (found := log.read(positions)):
            messages.append(found)
            positions = advance(positions, found)
    messages += read_all(log, positions)[0]
    for message in messages:
        assert (message.first_idx, message.request_id) == (start + len(ids), "r")
        ids.extend(message.token_ids)
        text += message.text
    assert ids == [idx + 10 for idx in range(start, num_tokens)]
    assert text == "x" * (num_tokens - start) + "!"
    assert [message.finish_reason for message in messages].count(STOP) == 1
    assert messages[-1].usage.completion_tokens == num_tokens


@given(data=st.data())
def test_reader_gets_what_it_wants_of_each_output_however_they_mix(data):
    nums_tokens = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    wanted = tuple(data.draw(st.integers(0, num_tokens + 1)) for num_tokens in nums_tokens)
    log, positions, told = AnswerLogs("r", num_outputs=len(nums_tokens)), wanted, [[] for _ in nums_tokens]
    todo = [
        [*(token(idx, idx + 10, output=i) for idx in range(num)), end(num, output=i)]
        for i, num in enumerate(nums_tokens)
    ]
    while any(todo):
        log.add(data.draw(st.sampled_from([part for part in todo if part])).pop(0))
        while data.draw(st.booleans()) and (found := log.read(positions)):
            positions = advance(positions, found)
            told[found.output_idx] += [*found.token_ids, *([-1] if found.finish_reason else [])]
    messages, positions = read_all(log, positions)
    for found in messages:
        told[found.output_idx] += [*found.token_ids, *([-1] if found.finish_reason else [])]
    wholes = [[*range(10, 10 + num_tokens), -1] for num_tokens in nums_tokens]
    assert told == [whole[start:] for whole, start in zip(wholes, wanted, strict=True)]
    assert log.is_whole
    assert positions == tuple(num_tokens + 1 for num_tokens in nums_tokens)


def test_worked_example():
    log = AnswerLogs("r")
    log.add(token(0, 7))
    log.add(token(1, 8))
    log.add(end(2))
    (message,), positions = read_all(log, (1,))
    assert (list(message.token_ids), message.finish_reason, positions) == ([8], STOP, (3,))


def test_output_that_is_furthest_behind_is_read_first():
    log = AnswerLogs("r", num_outputs=2)
    for idx in range(3):
        log.add(token(idx, output=0))
        log.add(token(idx, output=1))
    assert log.read((2, 1)).output_idx == 1
    assert log.read((2, 3)).output_idx == 0
    assert log.read((3, 3)) is None


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        (GenerateRequest(), (0,)),
        (GenerateRequest(resume_from=4), (4,)),
        (GenerateRequest(n=3), (0, 0, 0)),
        (GenerateRequest(n=2, resume_each=[0, 5]), (0, 5)),
    ],
)
def test_where_a_request_wants_its_outputs_to_begin(given, positions):
    assert first_wanted(given) == positions


def test_example_of_the_docs_of_advance():
    assert advance(
        (4, 2), GenerateResponse(output_idx=1, first_idx=2, token_ids=[5], finish_reason=STOP)
    ) == (4, 4)


@pytest.mark.parametrize(
    "message",
    [
        token(2),
        token(4),
        end(2),
        GenerateResponse(first_idx=3),
        GenerateResponse(first_idx=3, token_ids=[1, 2]),
    ],
)
def test_message_that_does_not_follow_is_refused(message):
    with pytest.raises(InternalError, match="at 3"):
        log_of(3, is_whole=False).add(message)


def test_nothing_follows_the_end():
    with pytest.raises(InternalError, match="is whole"):
        log_of(3).add(token(3))


@pytest.mark.parametrize(("num_outputs", "field"), [(1, "resume_from"), (2, "resume_each")])
def test_start_behind_the_end_of_a_whole_answer_is_refused(num_outputs, field):
    log = AnswerLogs("r", num_outputs=num_outputs)
    log.add(token(0))
    for output in range(num_outputs):
        log.add(end(1 - output, output=output))
    others = (0,) * (num_outputs - 1)
    log.check_start((2, *others))
    with pytest.raises(InvalidRequest, match="output 0") as caught:
        log.check_start((3, *others))
    assert caught.value.field == field


def test_fingerprint_tells_requests_apart_but_not_their_parts():
    first = GenerateRequest(request_id="r", tokens=TokenIds(ids=[1, 2]), max_tokens=3)
    again = GenerateRequest(
        request_id="r", tokens=TokenIds(ids=[1, 2]), max_tokens=3, resume_from=2, resume_each=[2]
    )
    other = GenerateRequest(request_id="r", tokens=TokenIds(ids=[1, 2]), max_tokens=4)
    assert fingerprint_of(first) == fingerprint_of(again) != fingerprint_of(other)
    assert again.resume_from == 2


@pytest.mark.parametrize("finish", [common_pb2.FINISH_REASON_UNSPECIFIED, STOP])
def test_split_batch_has_one_token_each_and_the_end_apart(finish):
    pieces = TokenBatch(first_idx=4, token_ids=(8, 9), finish_reason=finish).split()
    assert [(piece.first_idx, piece.token_ids) for piece in pieces[:2]] == [(4, (8,)), (5, (9,))]
    assert [(piece.first_idx, piece.token_ids, piece.finish_reason) for piece in pieces[2:]] == (
        [(6, (), STOP)] if finish else []
    )
    assert not any(piece.finish_reason for piece in pieces[:2])


def test_answer_is_kept_for_its_time():
    shelf = AnswerShelf(ShelfLimits(keep_s=60, keep_requests=9, keep_tokens=99))
    shelf.put("a", kept(3, end_s=100.0), now_s=100.0)
    assert shelf.find("a", now_s=159.9).log.num_tokens == 3
    assert shelf.find("a", now_s=160.0) is None
    assert (len(shelf), shelf.num_tokens) == (0, 0)


def test_oldest_answer_goes_first_and_one_that_is_too_long_is_not_kept():
    shelf = AnswerShelf(ShelfLimits(keep_s=60, keep_requests=9, keep_tokens=10))
    for name, num_tokens in (("a", 4), ("b", 4), ("c", 4)):
        shelf.put(name, kept(num_tokens), now_s=0.0)
    assert shelf.find("a", now_s=0.0) is None
    assert shelf.find("b", now_s=0.0)
    shelf.put("d", kept(11), now_s=0.0)
    assert shelf.find("d", now_s=0.0) is None


class ShelfMachine(RuleBasedStateMachine):
    """Puts, finds and waits in any order; limits and sums hold."""

    def __init__(self):
        super().__init__()
        self.shelf = AnswerShelf(ShelfLimits(keep_s=5, keep_requests=3, keep_tokens=12))
        self.now_s = 0.0

    @rule(name=st.sampled_from("abcdef"), num_tokens=st.integers(0, 15))
    def put(self, name, num_tokens):
        self.shelf.put(name, kept(num_tokens, end_s=self.now_s), now_s=self.now_s)
        if num_tokens <= 12:
            assert self.shelf.find(name, now_s=self.now_s).log.num_tokens == num_tokens

    @rule(wait_s=st.floats(0, 6))
    def wait(self, wait_s):
        self.now_s += wait_s

    @rule(name=st.sampled_from("abcdef"))
    def find(self, name):
        found = self.shelf.find(name, now_s=self.now_s)
        assert found is None or self.now_s - found.end_s < 5

    @invariant()
    def limits_hold(self):
        self.shelf.check_integrity()
        assert len(self.shelf) <= 3
        assert self.shelf.num_tokens <= 12


TestShelfMachine = ShelfMachine.TestCase


def test_split_batch_keeps_log_probabilities_beside_their_tokens():
    one, two = (common_pb2.TokenLogprobs(logprob=-value) for value in (1, 2))
    finish = common_pb2.FINISH_REASON_LENGTH
    batch = TokenBatch(
        first_idx=0, token_ids=(8, 9), finish_reason=finish, logprobs=(one, two), prompt_logprobs=(two, one)
    )
    assert [piece.logprobs for piece in batch.split()] == [(one,), (two,), ()]
    assert [piece.prompt_logprobs for piece in batch.split()] == [(two, one), (), ()]
    waiting = TokenBatch(first_idx=0, token_ids=(), finish_reason=0, prompt_logprobs=(one,))
    assert waiting.split() == (waiting,)
