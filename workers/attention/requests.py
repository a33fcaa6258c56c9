"""Requests as they arrive at an attention worker, checked and turned into what the engine takes."""

from collections.abc import Sequence

from model.config import ModelConfig
from wire.errors import InvalidRequest, PromptTooLong
from wire.proto import attention_pb2, common_pb2
from workers.attention.scoring import ScoreSpec
from workers.attention.types import Finish, Sampling, SequenceSpec, Source

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
        source = Source.REMOTE if request.prefill_address else Source.LOCAL
    return SequenceSpec(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=tuple(request.token_ids),
        num_prompt_tokens=request.prompt_tokens or len(request.token_ids),
        max_tokens=request.max_tokens,
        stop_token_ids=frozenset(request.stop_token_ids),
        sampling=read_sampling(request.sampling),
        source=source,
        first_wanted_row=request.first_wanted_row,
    )


def read_sampling(message: common_pb2.SamplingParams) -> Sampling:
    """How to choose tokens.

    Raises:
        InvalidRequest: temperature or top_p is out of range.
    """
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not (0 <= message.temperature < float("inf") and 0 < top_p <= 1):
        message_text = f"temperature {message.temperature} must be finite and >= 0, top_p {top_p} in (0, 1]"
        raise InvalidRequest(message_text, field="sampling")
    return Sampling(temperature=message.temperature, top_p=top_p, top_k=message.top_k, seed=message.seed)


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
