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


def test_worker_is_told_priority_and_tenant(make):
    sequence = Transcript(make.request(priority=-7, tenant="t")).plan_sequence(attempt=0, prefill_address="")
    assert (sequence.priority, sequence.tenant) == (-7, "t")


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


def logprobs(*values):
    return [common_pb2.TokenLogprobs(logprob=value) for value in values]


def test_log_probabilities_of_tokens_stay_beside_them(make):
    transcript = Transcript(make.request())
    batch = transcript.accept(attention_pb2.SequenceEvent(token_ids=[20, 21], logprobs=logprobs(-1, -2)))
    assert list(batch.logprobs) == logprobs(-1, -2)


def test_log_probabilities_of_the_prompt_are_told_once_however_often_it_is_tried(make):
    """Attempts of 3, 1 and 4 values: the client gets 3, nothing, and the fourth."""
    transcript = Transcript(make.request())
    got = []
    for attempt, values in enumerate(((-1, -2, -3), (-1,), (-1, -2, -3, -4))):
        transcript.plan_sequence(attempt=attempt, prefill_address="")
        batches = [
            transcript.accept(attention_pb2.SequenceEvent(prompt_logprobs=logprobs(value)))
            for value in values
        ]
        got.append([list(batch.prompt_logprobs) for batch in batches])
        assert [batch.is_empty for batch in batches] == [not batch.prompt_logprobs for batch in batches]
    assert got == [
        [logprobs(-1), logprobs(-2), logprobs(-3)],
        [[]],
        [[], [], [], logprobs(-4)],
    ]


def test_replay_after_the_first_token_asks_for_the_prompts_no_more(make):
    sampling = common_pb2.SamplingParams(seed=11, prompt_logprobs=2)
    transcript = Transcript(make.request(sampling=sampling))
    assert transcript.plan_sequence(attempt=0, prefill_address="").sampling == sampling
    transcript.accept(event(20))
    again = transcript.plan_sequence(attempt=1, prefill_address="").sampling
    assert again == common_pb2.SamplingParams(seed=11)
    assert sampling.HasField("prompt_logprobs")
