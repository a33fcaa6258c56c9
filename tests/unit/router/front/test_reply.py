"""From batches of tokens to messages: what a stop string ends, and what is counted."""

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.front.reply import ReplyStream, split_end
from router.front.tokenizer import PromptTokenizer, TextStream
from router.requests.types import AdmittedRequest, TokenBatch
from wire.proto import common_pb2

UNSPECIFIED = common_pb2.FINISH_REASON_UNSPECIFIED
STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    """One token a byte, plus one for "d#" and one for "#e"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: idx for idx, char in enumerate([*alphabet, "d#", "#e"])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[("d", "#"), ("#", "e")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PromptTokenizer(tokenizer=plain, bos_token_id=None)


def reply(tokenizer: PromptTokenizer, *stop: str, **sampling: int) -> ReplyStream:
    request = AdmittedRequest(
        request_id="r",
        wire_id="r~1",
        model="f",
        prompt_ids=(5, 6),
        max_tokens=30,
        stop_token_ids=(),
        stop=stop,
        sampling=common_pb2.SamplingParams(**sampling),
    )
    return ReplyStream(request, TextStream(tokenizer))


def batches(tokenizer: PromptTokenizer, *texts: str, finish=UNSPECIFIED) -> list[TokenBatch]:
    """A batch for each text; the last has the finish reason."""
    made, first_idx = [], 0
    for idx, text in enumerate(texts):
        ids = tokenizer.encode(text)
        reason = finish if idx == len(texts) - 1 else UNSPECIFIED
        made.append(TokenBatch(first_idx=first_idx, token_ids=ids, finish_reason=reason))
        first_idx += len(ids)
    return made


def test_stop_string_across_tokens_of_one_batch_cuts_tokens_and_text(tokenizer):
    (batch,) = batches(tokenizer, "abcd##efgh")
    assert batch.token_ids == tokenizer.encode("abcd##efgh")
    response = reply(tokenizer, "##").take(batch)
    # "a", "b", "c", "d#", "#e": the last token that counts completes the stop string.
    assert (response.text, len(response.token_ids), response.finish_reason) == ("abcd", 5, STOP)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 5)


def test_text_that_may_begin_a_stop_string_waits_but_its_tokens_do_not(tokenizer):
    stream = reply(tokenizer, "##")
    responses = [stream.take(batch) for batch in batches(tokenizer, "ad#", "x", "#", finish=LENGTH)]
    assert [response.text for response in responses] == ["ad", "#x", "#"]
    assert [len(response.token_ids) for response in responses] == [2, 1, 1]
    assert [response.finish_reason for response in responses] == [UNSPECIFIED, UNSPECIFIED, LENGTH]
    assert responses[-1].usage.completion_tokens == 4


def test_stop_string_completed_by_the_last_token_is_the_reason(tokenizer):
    stream = reply(tokenizer, "bc")
    response = [stream.take(batch) for batch in batches(tokenizer, "ab", "c", finish=LENGTH)][-1]
    assert (response.text, response.finish_reason, response.usage.completion_tokens) == ("", STOP, 3)


def test_stop_string_in_half_a_character_at_the_end_is_found(tokenizer):
    stream = reply(tokenizer, "\ufffd")
    (half,) = batches(tokenizer, "é", finish=LENGTH)
    batch = TokenBatch(first_idx=0, token_ids=half.token_ids[:1], finish_reason=LENGTH)
    response = stream.take(batch)
    assert (response.text, response.finish_reason) == ("", STOP)


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaab")])
def test_stop_string_counts_behind_min_tokens_only(tokenizer, min_tokens, text):
    stream = reply(tokenizer, "a", min_tokens=min_tokens)
    responses = []
    for batch in batches(tokenizer, "a", "a", "ab", "b", "a"):
        responses.append(stream.take(batch))
        if responses[-1].finish_reason != UNSPECIFIED:
            break
    assert "".join(response.text for response in responses).startswith(text)
    assert responses[-1].finish_reason == STOP
    assert responses[-1].usage.completion_tokens > min_tokens


def test_log_probabilities_end_with_the_tokens(tokenizer):
    (batch,) = batches(tokenizer, "abc")
    values = tuple(common_pb2.TokenLogprobs(logprob=-value) for value in (1, 2, 3))
    response = reply(tokenizer, "b", logprobs=0).take(dataclasses.replace(batch, logprobs=values))
    assert [one.logprob for one in response.logprobs] == [-1, -2]


@pytest.mark.parametrize("num_told", [0, 2])
def test_log_probabilities_of_the_prompt_wait_for_the_first_token(tokenizer, num_told):
    """Nothing precedes the prompt's first token: its entry is empty."""
    stream = reply(tokenizer, prompt_logprobs=1)
    told = [common_pb2.TokenLogprobs(logprob=-value - 1) for value in range(num_told)]
    for one in told:
        batch = TokenBatch(first_idx=0, token_ids=(), finish_reason=UNSPECIFIED, prompt_logprobs=(one,))
        assert stream.take(batch) is None
    first, second = batches(tokenizer, "a", "b")
    assert list(stream.take(first).prompt_logprobs) == [common_pb2.TokenLogprobs(), *told]
    assert not stream.take(second).prompt_logprobs


def test_end_comes_apart_from_the_tokens_for_who_may_resume(tokenizer):
    (batch,) = batches(tokenizer, "ab", finish=LENGTH)
    response = reply(tokenizer).take(batch)
    tokens, end = split_end(response)
    assert (list(tokens.token_ids), tokens.text, tokens.finish_reason) == (list(batch.token_ids), "ab", 0)
    assert (list(end.token_ids), end.first_idx, end.finish_reason) == ([], 2, LENGTH)
    assert (end.usage, end.request_id, tokens.HasField("usage")) == (response.usage, "r", False)
    assert split_end(tokens) == (tokens,)
    assert split_end(end) == (end,)
