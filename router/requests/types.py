"""What the request side of the router passes around: the admitted request, tokens out, a failure."""

from dataclasses import dataclass, replace

from wire.errors import MorayError
from wire.proto import common_pb2


@dataclass(frozen=True, kw_only=True)
class AdmittedRequest:
    """A request that passed every check; sent to workers as often as needed."""

    request_id: str
    """What the client calls it; goes back in every response."""
    wire_id: str
    """What workers call it: unique over all routers and clients."""
    model: str
    """Fingerprint of the model that it was checked against; workers of another one refuse it."""
    prompt_ids: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """New tokens at most, >= 1; fits the context together with the prompt."""
    stop_token_ids: tuple[int, ...]
    """Ids that end the sequence; () = only `max_tokens` does."""
    stop: tuple[str, ...]
    """Strings that end the text."""
    sampling: common_pb2.SamplingParams
    """Checked, with its seed; never written again."""
    priority: int = 0
    """In [-100, 100]; higher goes first where requests wait."""
    tenant: str = ""
    """Tenants of one priority get the same share of a worker."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """New tokens of a request, in order."""

    first_idx: int
    """Position of the first of them among the new tokens, from 0."""
    token_ids: tuple[int, ...]
    finish_reason: "common_pb2.FinishReason.ValueType"
    """FINISH_REASON_UNSPECIFIED unless these are the last."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the workers of the first attempt did not have to compute."""
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    """One a token, where asked for."""
    prompt_logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    """Of the next tokens of the prompt from its second on, where asked for."""

    @property
    def is_empty(self) -> bool:
        """Whether the client learns nothing from it."""
        is_last = self.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
        return not (self.token_ids or self.prompt_logprobs or is_last)

    def split(self) -> "tuple[TokenBatch, ...]":
        """The same, one token a batch; the finish reason comes after them in a batch of its own."""
        unfinished = common_pb2.FINISH_REASON_UNSPECIFIED
        single = tuple(
            replace(
                self,
                first_idx=self.first_idx + idx,
                token_ids=(token_id,),
                finish_reason=unfinished,
                logprobs=self.logprobs[idx : idx + 1],
                prompt_logprobs=self.prompt_logprobs if idx == 0 else (),
            )
            for idx, token_id in enumerate(self.token_ids)
        )
        if self.finish_reason == unfinished:
            return single or (self,)
        end = replace(self, first_idx=self.first_idx + len(single), token_ids=(), logprobs=())
        return (*single, replace(end, prompt_logprobs=()) if single else end)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt's end other than success."""

    error: MorayError
    is_answer: bool
    """The worker itself said so; False = the connection or the process broke."""
    made_progress: bool
    """Tokens of this attempt reached the client."""
