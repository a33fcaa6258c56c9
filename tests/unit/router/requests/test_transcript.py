"""Tokens are numbered without gap or repeat, and a replay asks for the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.requests.transcript import Transcript
from wire.errors import InternalError
from wire.proto import attention_pb2, common_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH
STOP = common_pb2.FINISH_REASON_STOP


def event(*ids, finish=common_pb2.FINISH_REASON_UNSPECIFIED):
    return attention_pb2.SequenceEvent(token_ids=ids, finish_reason=finish)


@given(st.lists(st.lists(st.integers(2, 99), max_size=4), max_size=8))
def test_numbering_is_contiguous_however_tokens_are_cut(make, chunks):
    transcript = Transcript(make.request(max_tokens=40))
    batches = [transcript.accept(event(*chunk)) for chunk in chunks]
    joined = [token_id for batch in batches for token_id in batch.token_ids]
    assert joined == [token_id for chunk in chunks for token_id in chunk]
    assert [batch.first_idx for batch in batches] == [
        sum(len(chunk) for chunk in chunks[:idx]) for idx in range(len(chunks))
    ]


def test_replay_asks_for_the_rest_after_what_is_there(make):
    transcript = Transcript(make.request(max_tokens=10))
    transcript.accept(event(20, 21, 22))
    sequence = transcript.plan_sequence(attempt=2, prefill_address="p:1")
    assert list(sequence.token_ids) == [5, 6, 7, 20, 21, 22]
    assert (sequence.max_tokens, sequence.prompt_tokens, sequence.attempt) == (7, 3, 2)
    assert (sequence.request_id, sequence.prefill_address) == ("r~1", "p:1")
    assert sequence.sampling.seed == 11
    assert list(sequence.stop_token_ids) == [1]


def test_cached_tokens_are_those_of_the_first_attempt(make):
    """A replay hits what the first attempt computed: that is no saving. Never more than the prompt's 3."""
    transcript = Transcript(make.request(max_tokens=4))
    first = attention_pb2.SequenceEvent(token_ids=[20], num_cached_tokens=2)
    assert transcript.accept(first).num_cached_tokens == 2
    replay = attention_pb2.SequenceEvent(token_ids=[21, 22, 23], num_cached_tokens=3, finish_reason=LENGTH)
    assert transcript.accept(replay).num_cached_tokens == 2
    assert transcript.plan_ending().num_cached_tokens == 2


def test_too_many_tokens_are_refused(make):
    transcript = Transcript(make.request(max_tokens=2))
    transcript.accept(event(20))
    with pytest.raises(InternalError, match="at most 2"):
        transcript.accept(event(21, 22))


@pytest.mark.parametrize(
    ("ids", "stop", "reason"),
    [((20, 21), (1,), LENGTH), ((20, 1), (1,), STOP), ((1,), (1,), STOP), ((1,), (), None), ((), (1,), None)],
)
def test_ending_is_known_from_the_tokens_alone(make, ids, stop, reason):
    transcript = Transcript(make.request(max_tokens=2, stop_token_ids=stop))
    transcript.accept(event(*ids))
    ending = transcript.plan_ending()
    assert (ending.finish_reason if ending else None) == reason
    if ending:
        assert (ending.first_idx, ending.token_ids) == (len(ids), ())
