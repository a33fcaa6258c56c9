"""Requests as they arrive at an attention worker, checked and turned into what the engine takes."""

import math
from collections.abc import Sequence

from model.config import ModelConfig
from wire.errors import InvalidRequest, PromptTooLong
from wire.proto import attention_pb2, common_pb2
from wire.sampling import check_sampling
from workers.attention.grammar import Grammar
from workers.attention.scoring import ScoreSpec
from workers.attention.types import (
    Finish,
    NewToken,
    PromptLogprobs,
    Sampling,
    SequenceSpec,
    Source,
    TokenLogprobs,
)

FINISH_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    Finish.STOP: common_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


def read_sequence(
    request: attention_pb2.SequenceRequest, config: ModelConfig, *, is_prefill_only: bool
) -> SequenceSpec:
    """The sequence that a router or a decode worker asks for.

    Raises:
        InvalidRequest: a field is out of range.
        PromptTooLong: prompt and new tokens exceed the model's context.
    """
    check_tokens(request.token_ids, config)
    wrong = [token_id for token_id in request.stop_token_ids if token_id >= config.vocab_size]
    if wrong:
        message = f"stop_token_ids: {wrong[0]} is outside the vocabulary of {config.vocab_size}"
        raise InvalidRequest(message, field="stop_token_ids")
    num_tokens = len(request.token_ids) + request.max_tokens
    if request.max_tokens == 0:
        raise InvalidRequest("max_tokens: wanted at least 1, got 0", field="max_tokens")
    if request.prompt_tokens > len(request.token_ids):
        wanted = f"wanted at most the {len(request.token_ids)} tokens given, got {request.prompt_tokens}"
        raise InvalidRequest(f"prompt_tokens: {wanted}", field="prompt_tokens")
    if num_tokens > config.max_position_embeddings:
        limit = config.max_position_embeddings
        message = (
            f"{len(request.token_ids)} tokens and max_tokens {request.max_tokens}: the context has {limit}"
        )
        raise PromptTooLong(message, field="max_tokens")
    if request.first_wanted_row > len(request.token_ids):
        wanted = f"wanted at most the {len(request.token_ids)} tokens given, got {request.first_wanted_row}"
        raise InvalidRequest(f"first_wanted_row: {wanted}", field="first_wanted_row")
    if is_prefill_only:
        source = Source.PREFILL_ONLY
    else:
        # A prefill worker sends cache rows, not the prompt's logits: those come from computing it here.
        is_remote = request.prefill_address and not request.sampling.HasField("prompt_logprobs")
        source = Source.REMOTE if is_remote else Source.LOCAL
    return SequenceSpec(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=tuple(request.token_ids),
        num_prompt_tokens=request.prompt_tokens or len(request.token_ids),
        max_tokens=request.max_tokens,
        stop_token_ids=frozenset(request.stop_token_ids),
        sampling=read_sampling(request.sampling, config),
        source=source,
        first_wanted_row=request.first_wanted_row,
        priority=request.priority,
        tenant=request.tenant,
        deadline_ms=request.deadline_ms,
    )


def ask_prefill(
    request: attention_pb2.SequenceRequest, *, first_row: int, transfer: int, waited_s: float
) -> attention_pb2.SequenceRequest:
    """What a decode worker asks its prefill worker for; of the deadline, what the wait here left.

    Args:
        request: what the decode worker was asked for.
        first_row: the rows before are cached here.
        transfer: which pull of this request it is, from 0.
        waited_s: seconds since the request came here.
    """
    asked = attention_pb2.SequenceRequest()
    asked.CopyFrom(request)
    asked.first_wanted_row = first_row
    asked.transfer = transfer
    if request.deadline_ms:
        # 0 would mean that there is no deadline; a worker refuses 1 ms just as well.
        asked.deadline_ms = max(1, request.deadline_ms - math.ceil(waited_s * 1000))
    return asked


def read_sampling(message: common_pb2.SamplingParams, config: ModelConfig) -> Sampling:
    """How to choose tokens.

    Raises:
        InvalidRequest: naming the number that is out of range.
    """
    check_sampling(message, vocab_tokens=config.vocab_size)
    has_repetition = message.HasField("repetition_penalty")
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        repetition_penalty=message.repetition_penalty if has_repetition else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def read_grammar(message: common_pb2.SamplingParams) -> Grammar | None:
    """What the text must be; None = anything."""
    kind = message.WhichOneof("structure")
    return None if kind is None else Grammar(kind, getattr(message, kind))


def write_event(event: NewToken | PromptLogprobs) -> attention_pb2.SequenceEvent:
    """The message of an event."""
    if isinstance(event, PromptLogprobs):
        return attention_pb2.SequenceEvent(prompt_logprobs=map(_write_logprobs, event.rows))
    return attention_pb2.SequenceEvent(
        token_ids=[event.token_id],
        finish_reason=FINISH_TO_PROTO[event.finish],
        num_cached_tokens=event.num_cached_tokens,
        logprobs=[] if event.logprobs is None else [_write_logprobs(event.logprobs)],
    )


def _write_logprobs(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def read_score(
    request: attention_pb2.ScoreRequest, config: ModelConfig, *, max_chunk_tokens: int
) -> ScoreSpec:
    """The prompt to score.

    Raises:
        InvalidRequest: no tokens, or an id outside the vocabulary.
        PromptTooLong: more tokens than the model's context.
    """
    check_tokens(request.token_ids, config)
    if len(request.token_ids) > config.max_position_embeddings:
        message = f"{len(request.token_ids)} tokens: the context has {config.max_position_embeddings}"
        raise PromptTooLong(message, field="tokens")
    return ScoreSpec(
        token_ids=tuple(request.token_ids),
        chunk_tokens=request.chunk_tokens or max_chunk_tokens,
    )


def check_tokens(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Refuses an empty prompt and ids outside the vocabulary.

    Raises:
        InvalidRequest: naming the first wrong id.
    """
    if not token_ids:
        raise InvalidRequest("tokens: wanted at least one, got none", field="tokens")
    wrong = [token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size]
    if wrong:
        message = f"tokens: {wrong[0]} is outside the vocabulary of {config.vocab_size}"
        raise InvalidRequest(message, field="tokens")
