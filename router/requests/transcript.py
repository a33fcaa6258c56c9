"""The tokens of one request so far: numbers them, and knows what is left to ask for after a replay."""

from router.requests.types import AdmittedRequest, TokenBatch
from wire.errors import InternalError
from wire.proto import attention_pb2, common_pb2


class Transcript:
    """Grows by what workers send; nothing repeated, nothing dropped. No I/O."""

    def __init__(self, request: AdmittedRequest) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._num_cached_tokens = 0
        self._num_prompt_told = 0
        """Log-probabilities of the prompt that the client has."""
        self._num_prompt_seen = 0
        """Those that this attempt has sent; a replay sends them from the first on again."""

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return len(self._token_ids)

    def plan_sequence(self, *, attempt: int, prefill_address: str) -> attention_pb2.SequenceRequest:
        """What to ask of a worker: go on after the prompt and every token so far."""
        request = self._request
        sampling = request.sampling
        if self._token_ids and sampling.HasField("prompt_logprobs"):
            sampling = common_pb2.SamplingParams()
            sampling.CopyFrom(request.sampling)
            sampling.ClearField("prompt_logprobs")  # they come before the first token
        self._num_prompt_seen = 0
        return attention_pb2.SequenceRequest(
            request_id=request.wire_id,
            attempt=attempt,
            token_ids=(*request.prompt_ids, *self._token_ids),
            max_tokens=request.max_tokens - self.num_tokens,
            sampling=sampling,
            stop_token_ids=request.stop_token_ids,
            prefill_address=prefill_address,
            prompt_tokens=len(request.prompt_ids),
            priority=request.priority,
            tenant=request.tenant,
        )

    def accept(self, event: attention_pb2.SequenceEvent) -> TokenBatch:
        """What an event brings, its tokens numbered.

        Raises:
            InternalError: the worker sent more tokens than it was asked for.
        """
        if not self._token_ids:
            self._num_cached_tokens = min(event.num_cached_tokens, len(self._request.prompt_ids))
        batch = TokenBatch(
            first_idx=self.num_tokens,
            token_ids=tuple(event.token_ids),
            finish_reason=event.finish_reason,
            num_cached_tokens=self._num_cached_tokens,
            logprobs=tuple(event.logprobs),
            prompt_logprobs=self._take_prompt(event),
        )
        if self.num_tokens + len(batch.token_ids) > self._request.max_tokens:
            raise InternalError(
                f"request {self._request.request_id}: wanted at most {self._request.max_tokens} new tokens, "
                f"a worker sent {len(batch.token_ids)} after {self.num_tokens}"
            )
        self._token_ids.extend(batch.token_ids)
        return batch

    def _take_prompt(self, event: attention_pb2.SequenceEvent) -> tuple[common_pb2.TokenLogprobs, ...]:
        """What the client does not have yet."""
        num_known = max(self._num_prompt_told - self._num_prompt_seen, 0)
        self._num_prompt_seen += len(event.prompt_logprobs)
        self._num_prompt_told = max(self._num_prompt_told, self._num_prompt_seen)
        return tuple(event.prompt_logprobs[num_known:])

    def plan_ending(self) -> TokenBatch | None:
        """The last batch, where the tokens say that it is over though no worker did; else None.

        A worker that dies between its last token and the end mark leaves nothing to replay.
        """
        reason = common_pb2.FINISH_REASON_UNSPECIFIED
        if self._token_ids and self._token_ids[-1] in self._request.stop_token_ids:
            reason = common_pb2.FINISH_REASON_STOP
        elif self.num_tokens == self._request.max_tokens:
            reason = common_pb2.FINISH_REASON_LENGTH
        if reason == common_pb2.FINISH_REASON_UNSPECIFIED:
            return None
        return TokenBatch(
            first_idx=self.num_tokens,
            token_ids=(),
            finish_reason=reason,
            num_cached_tokens=self._num_cached_tokens,
        )
