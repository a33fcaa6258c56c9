"""One output of a request, from the tokens of the workers to the messages of the client."""

from router.front.stops import StopFilter
from router.front.tokenizer import TextStream
from router.requests.types import AdmittedRequest, TokenBatch
from wire.proto import common_pb2, inference_pb2


class ReplyStream:
    """Turns batches into messages; ends the output itself where a stop string is complete."""

    def __init__(self, request: AdmittedRequest, text: TextStream) -> None:
        self._request = request
        self._text = text
        self._filter = StopFilter(request.stop)
        self._prompt_logprobs: list[common_pb2.TokenLogprobs] = []
        """Wait for the first token; nothing precedes the first token of the prompt, so its entry is empty."""
        if request.sampling.HasField("prompt_logprobs"):
            self._prompt_logprobs.append(common_pb2.TokenLogprobs())

    def take(self, batch: TokenBatch) -> inference_pb2.GenerateResponse | None:
        """The message of a batch, if it makes one; the last has a finish reason, and nothing may follow it.

        The token that completes a stop string is the last that is passed on and counted; the stop string and
        what that token says behind it are not in the text.
        """
        self._prompt_logprobs.extend(batch.prompt_logprobs)
        if not batch.token_ids and batch.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
            return None
        num_taken, text, reason = len(batch.token_ids), "", batch.finish_reason
        if self._request.stop:
            num_taken, text = self._read(batch)
        else:
            text = self._text.push(batch.token_ids)
        if not self._filter.is_over and reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            may_stop = batch.first_idx + num_taken > self._request.sampling.min_tokens
            text += self._filter.push(self._text.finish(), may_stop=may_stop) + self._filter.finish()
        if self._filter.is_over:
            reason = common_pb2.FINISH_REASON_STOP
        response = inference_pb2.GenerateResponse(
            request_id=self._request.request_id,
            first_idx=batch.first_idx,
            token_ids=batch.token_ids[:num_taken],
            text=text,
            finish_reason=reason,
            logprobs=batch.logprobs[:num_taken],
        )
        if batch.first_idx == 0 and batch.token_ids:
            response.prompt_logprobs.extend(self._prompt_logprobs)
        if reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            response.usage.prompt_tokens = len(self._request.prompt_ids)
            response.usage.completion_tokens = batch.first_idx + num_taken
            response.usage.cached_tokens = batch.num_cached_tokens
        return response

    def _read(self, batch: TokenBatch) -> tuple[int, str]:
        """How many tokens there are up to a stop string, and their text up to it."""
        pieces: list[str] = []
        for idx, token_id in enumerate(batch.token_ids):
            may_stop = batch.first_idx + idx >= self._request.sampling.min_tokens
            pieces.append(self._filter.push(self._text.push((token_id,)), may_stop=may_stop))
            if self._filter.is_over:
                return idx + 1, "".join(pieces)
        return len(batch.token_ids), "".join(pieces)


def split_end(
    response: inference_pb2.GenerateResponse,
) -> tuple[inference_pb2.GenerateResponse, ...]:
    """The same in a message of its tokens and one of its end, where it has both."""
    if not response.token_ids or response.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
        return (response,)
    tokens, end = inference_pb2.GenerateResponse(), inference_pb2.GenerateResponse()
    tokens.CopyFrom(response)
    tokens.ClearField("finish_reason")
    tokens.ClearField("usage")
    end.request_id, end.first_idx = response.request_id, response.first_idx + len(response.token_ids)
    end.finish_reason = response.finish_reason
    end.usage.CopyFrom(response.usage)
    return (tokens, end)
