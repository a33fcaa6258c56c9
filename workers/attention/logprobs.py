"""Log-probabilities of tokens by the model's own logits, before any sampling parameter changes them.

R rows, V vocabulary, D hidden.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.attention.types import PromptLogprobs, SequenceState, TokenLogprobs

_LEAST = -9999.0
"""What log-probabilities below it are told as: JSON has no -inf. Source: vLLM's OpenAI server."""
_LOGIT_ROWS = 64
"""Rows whose logits are held at once: 32 MiB of float32 with V3.2's vocabulary."""


def compute_logprobs(logits_V: Tensor, token_id: int, *, num_top: int) -> TokenLogprobs:
    """The log-probability of a token and of the most probable ones.

    Example: probabilities 0.5, 0.25, 0.25, token 2 and num_top 2 give ln 0.25 and ((0, ln 0.5),
    (1, ln 0.25)).

    Args:
        logits_V: (V,) float32.
        token_id: the token.
        num_top: how many others, 0 to 20; smaller ids come first among equals.
    """
    logprobs_V = logits_V.double().log_softmax(-1).clamp(min=_LEAST)
    return TokenLogprobs(float(logprobs_V[token_id]), _top(logprobs_V, num_top))


def tell_prompt(
    sequence: SequenceState, hidden_RD: Tensor, *, begin: int, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Tells the sequence's sink about the tokens of the prompt that follow these rows, each once.

    Args:
        sequence: one with `needs_prompt_rows`.
        hidden_RD: (R, D), the rows of one step.
        begin: position of the first row.
        logits_of: (R, D) to (R, V) float32.
    """
    num_top = sequence.spec.sampling.prompt_logprobs or 0
    first = max(begin, sequence.num_prompt_logprobs)
    end = min(begin + hidden_RD.shape[0], sequence.spec.num_prompt_tokens - 1)
    for chunk_begin in range(first, end, _LOGIT_ROWS):
        chunk_end = min(chunk_begin + _LOGIT_ROWS, end)
        logits_RV = logits_of(hidden_RD[chunk_begin - begin : chunk_end - begin])
        targets: Sequence[int] = sequence.spec.token_ids[chunk_begin + 1 : chunk_end + 1]
        rows = (
            compute_logprobs(row, target, num_top=num_top)
            for row, target in zip(logits_RV, targets, strict=True)
        )
        sequence.num_prompt_logprobs = chunk_end
        sequence.sink(PromptLogprobs(tuple(rows)))


def _top(logprobs_V: Tensor, num_top: int) -> tuple[tuple[int, float], ...]:
    """The largest, in an order that is the same everywhere: topk leaves that of equals open."""
    if num_top == 0:
        return ()
    least = logprobs_V.topk(min(num_top, logprobs_V.shape[0])).values[-1]
    ids = torch.nonzero(logprobs_V >= least).flatten()
    sorted_values, order = logprobs_V[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order][:num_top].tolist(), sorted_values[:num_top].tolist(), strict=True))
