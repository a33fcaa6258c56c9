"""Requests at an attention worker: every refusal names its field."""

from typing import Any

import pytest

from model.config import ModelConfig, load_config
from tests.reference_data import checkpoint_dir
from wire.errors import InvalidRequest, PromptTooLong
from wire.proto import attention_pb2, common_pb2
from workers.attention.grammar import Grammar
from workers.attention.requests import (
    FINISH_TO_PROTO,
    ask_prefill,
    read_grammar,
    read_score,
    read_sequence,
    write_event,
)
from workers.attention.types import Finish, NewToken, PromptLogprobs, Sampling, Source, TokenLogprobs


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Context 512, vocabulary 320."""
    return load_config(checkpoint_dir("default"))


def request(**fields: Any) -> attention_pb2.SequenceRequest:
    base: dict[str, Any] = {"request_id": "r", "attempt": 3, "token_ids": [5, 6], "max_tokens": 4}
    return attention_pb2.SequenceRequest(**{**base, **fields})


def test_every_field_is_read(config: ModelConfig) -> None:
    numbers = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 2**64 - 1, "min_p": 0.125}
    numbers |= {
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "min_tokens": 2,
    }
    sampling = common_pb2.SamplingParams(**numbers, logit_bias={9: -1.0, 5: 2.5})
    given = request(
        prompt_tokens=1,
        sampling=sampling,
        stop_token_ids=[1, 9],
        prefill_address="127.0.0.1:5",
        priority=-3,
        tenant="t",
        deadline_ms=1500,
    )
    spec = read_sequence(given, config, is_prefill_only=False)
    assert (spec.key, spec.token_ids, spec.num_prompt_tokens) == (("r", 3), (5, 6), 1)
    assert (spec.max_tokens, spec.stop_token_ids) == (4, frozenset({1, 9}))
    assert spec.sampling == Sampling(**numbers, logit_bias=((5, 2.5), (9, -1.0)))
    assert spec.num_reserved_tokens == 5
    assert (spec.priority, spec.tenant, spec.deadline_ms) == (-3, "t", 1500)


@pytest.mark.parametrize(
    ("deadline_ms", "waited_s", "left_ms"),
    [(1500, 0.0, 1500), (1500, 0.2501, 1249), (1500, 1.5, 1), (1500, 90.0, 1), (0, 90.0, 0)],
)
def test_prefill_worker_is_told_what_the_wait_left_of_the_deadline(
    deadline_ms: int, waited_s: float, left_ms: int
) -> None:
    given = request(deadline_ms=deadline_ms, tenant="t")
    asked = ask_prefill(given, first_row=1, transfer=2, waited_s=waited_s)
    assert asked == request(deadline_ms=left_ms, tenant="t", first_wanted_row=1, transfer=2)
    assert given.deadline_ms == deadline_ms


def test_what_is_left_out_is_greedy_over_the_whole_prompt(config: ModelConfig) -> None:
    spec = read_sequence(request(), config, is_prefill_only=False)
    assert (spec.sampling, spec.num_prompt_tokens, spec.stop_token_ids) == (Sampling(), 2, frozenset())


@pytest.mark.parametrize(
    ("address", "is_prefill_only", "source"),
    [
        ("", False, Source.LOCAL),
        ("h:1", False, Source.REMOTE),
        ("", True, Source.PREFILL_ONLY),
        ("h:1", True, Source.PREFILL_ONLY),
    ],
)
def test_source_follows_from_call_and_address(
    config: ModelConfig, address: str, is_prefill_only: bool, source: Source
) -> None:
    spec = read_sequence(request(prefill_address=address), config, is_prefill_only=is_prefill_only)
    assert spec.source is source


@pytest.mark.parametrize(
    ("sampling", "source", "takes_first_token", "needs_prompt_rows"),
    [
        ({}, Source.REMOTE, True, False),
        ({"logprobs": 0}, Source.REMOTE, False, False),
        ({"prompt_logprobs": 0}, Source.LOCAL, False, True),
    ],
    ids=str,
)
def test_log_probabilities_say_what_is_computed_here(
    config: ModelConfig,
    sampling: dict[str, int],
    source: Source,
    takes_first_token: bool,
    needs_prompt_rows: bool,
) -> None:
    given = request(prefill_address="h:1", sampling=sampling)
    spec = read_sequence(given, config, is_prefill_only=False)
    assert (spec.source, spec.takes_first_token, spec.needs_prompt_rows) == (
        source,
        takes_first_token,
        needs_prompt_rows,
    )


@pytest.mark.parametrize("kind", ["json_schema", "regex", "grammar"])
def test_structure_is_read_with_its_field(kind: str) -> None:
    assert read_grammar(common_pb2.SamplingParams(**{kind: "{}"})) == Grammar(kind, "{}")
    assert read_grammar(common_pb2.SamplingParams()) is None


def test_log_probabilities_are_in_the_events_message() -> None:
    logprobs = TokenLogprobs(-0.5, ((7, -0.25), (3, -0.5)))
    written = common_pb2.TokenLogprobs(logprob=-0.5, top_token_ids=[7, 3], top_logprobs=[-0.25, -0.5])
    new_token = write_event(NewToken(3, Finish.STOP, 2, logprobs))
    assert new_token == attention_pb2.SequenceEvent(
        token_ids=[3],
        finish_reason=common_pb2.FINISH_REASON_STOP,
        num_cached_tokens=2,
        logprobs=[written],
    )
    assert write_event(NewToken(3, None)) == attention_pb2.SequenceEvent(token_ids=[3])
    of_prompt = write_event(PromptLogprobs((logprobs, logprobs)))
    assert of_prompt == attention_pb2.SequenceEvent(prompt_logprobs=[written, written])


def test_prefill_needs_rows_of_the_prompt_only(config: ModelConfig) -> None:
    assert read_sequence(request(), config, is_prefill_only=True).num_reserved_tokens == 2


@pytest.mark.parametrize(
    ("fields", "field", "what"),
    [
        ({"token_ids": []}, "tokens", "wanted at least one, got none"),
        ({"token_ids": [5, 320, 999]}, "tokens", "320 is outside the vocabulary of 320"),
        ({"max_tokens": 0}, "max_tokens", "wanted at least 1, got 0"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature", "got -0.1"),
        ({"sampling": {"logit_bias": {320: 1.0}}}, "sampling.logit_bias", "got 320"),
        ({"stop_token_ids": [1, 320]}, "stop_token_ids", "320 is outside the vocabulary of 320"),
        ({"prompt_tokens": 3}, "prompt_tokens", "wanted at most the 2 tokens given, got 3"),
    ],
)
def test_refusal_names_the_field(config: ModelConfig, fields: dict[str, Any], field: str, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what) as caught:
        read_sequence(request(**fields), config, is_prefill_only=False)
    assert caught.value.field == field


def test_context_holds_prompt_and_new_tokens_together(config: ModelConfig) -> None:
    fits = request(token_ids=[5] * 500, max_tokens=12)
    assert read_sequence(fits, config, is_prefill_only=False).max_tokens == 12
    with pytest.raises(PromptTooLong, match="500 tokens and max_tokens 13: the context has 512") as caught:
        read_sequence(request(token_ids=[5] * 500, max_tokens=13), config, is_prefill_only=False)
    assert caught.value.field == "max_tokens"


@pytest.mark.parametrize(("given", "chunk_tokens"), [(0, 64), (1, 1), (999, 999)])
def test_score_reads_its_chunk_length(config: ModelConfig, given: int, chunk_tokens: int) -> None:
    message = attention_pb2.ScoreRequest(token_ids=[4] * 512, chunk_tokens=given)
    spec = read_score(message, config, max_chunk_tokens=64)
    assert (len(spec.token_ids), spec.chunk_tokens) == (512, chunk_tokens)


@pytest.mark.parametrize(
    ("token_ids", "error", "what"),
    [
        ([], InvalidRequest, "got none"),
        ([4, 320], InvalidRequest, "320 is outside"),
        ([4] * 513, PromptTooLong, "513 tokens: the context has 512"),
    ],
)
def test_score_refusal_names_the_tokens(
    config: ModelConfig, token_ids: list[int], error: type[InvalidRequest], what: str
) -> None:
    with pytest.raises(error, match=what) as caught:
        read_score(attention_pb2.ScoreRequest(token_ids=token_ids), config, max_chunk_tokens=64)
    assert caught.value.field == "tokens"


def test_every_finish_has_its_message() -> None:
    assert set(FINISH_TO_PROTO) == {None, *Finish}
    assert len(set(FINISH_TO_PROTO.values())) == 3
