"""The sampler: logits to a token, from a generator keyed by (seed, position), never by call order.

So the same request gives the same text in any batch, on any worker, before and after a replay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from workers.attention.adjust import adjust_logits
from workers.attention.grammar import GrammarTooComplex
from workers.attention.logprobs import compute_logprobs
from workers.attention.types import ChosenToken, Sampling, SequenceSpec


@dataclass(frozen=True)
class Turn:
    """Where one row of logits stands: everything besides them that decides its token."""

    spec: SequenceSpec
    token_ids: Sequence[int]
    """Prompt and output in front of the new token; read at once, never kept."""
    drafted: tuple[int, ...] = ()
    """Output behind `token_ids` that this row takes for granted: drafts of the rows before it."""

    @property
    def position(self) -> int:
        """Index of the new token behind the client's prompt, from 0."""
        return len(self.token_ids) + len(self.drafted) - self.spec.num_prompt_tokens


def sample_tokens(logits_BV: Tensor, turns: Sequence[Turn]) -> list[ChosenToken]:
    """The next token of each row, as `choose_token` chooses it; all plain greedy ones at once.

    Args:
        logits_BV: (B, V) float32.
        turns: B of them.
    """
    best: list[int] = logits_BV.argmax(-1).tolist()
    return [
        ChosenToken(token_id) if turn.spec.is_plain else choose_token(logits_BV[row], turn)
        for row, (token_id, turn) in enumerate(zip(best, turns, strict=True))
    ]


def choose_token(logits_V: Tensor, turn: Turn) -> ChosenToken:
    """The next token of one row: a function of its arguments alone, so a draft is right if it equals this.

    Args:
        logits_V: (V,) float32.
        turn: where the row stands.
    """
    sampling = turn.spec.sampling
    adjusted_V = logits_V
    if turn.spec.is_adjusted:
        try:
            adjusted_V = adjust_logits(logits_V, turn.spec, (*turn.token_ids, *turn.drafted))
        except GrammarTooComplex as error:
            # Told with the token, not raised: the step belongs to others, too, and a draft may not stand.
            return ChosenToken(0, problem=str(error))
    token_id = sample_token(adjusted_V, sampling, position=turn.position)
    if sampling.logprobs is None:
        return ChosenToken(token_id)
    return ChosenToken(token_id, compute_logprobs(logits_V, token_id, num_top=sampling.logprobs))


def sample_token(logits_V: Tensor, sampling: Sampling, *, position: int) -> int:
    """A token drawn from adjusted logits: min_p, then top_k, then top_p of what is left.

    Args:
        logits_V: (V,) float32 or float64.
        sampling: how to choose; temperature 0 takes the first maximum, and so do logits without a finite
            maximum, which have no softmax.
        position: index of the new token behind the client's prompt, from 0.
    """
    if sampling.temperature == 0.0 or not bool(logits_V.max().isfinite()):
        return int(logits_V.argmax())
    ids, kept = _keep_probable(logits_V.double() / sampling.temperature, sampling)
    cumulative = kept.softmax(-1).cumsum(-1).cpu()
    # The total is 1 up to rounding; scaling the draw keeps it below the last kept token's end.
    drawn = _uniform(sampling.seed, position) * cumulative[-1]
    return int(ids[int(torch.searchsorted(cumulative, drawn, right=True))])


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from a hash: torch's CPU generator keeps 32 bits of a seed."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _keep_probable(scaled_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens to draw from, by id, and their scaled logits: min_p, then top_k, then top_p of what is left.

    Only what can still be kept is sorted: a whole vocabulary would take longer than the step at times.
    """
    least = (
        scaled_V.max() + math.log(sampling.min_p) if sampling.min_p > 0.0 else scaled_V.new_tensor(-math.inf)
    )
    if 0 < sampling.top_k < scaled_V.shape[0]:
        least = torch.maximum(least, scaled_V.topk(sampling.top_k).values[-1])
    ids = torch.nonzero((scaled_V >= least) & ~scaled_V.isneginf()).flatten()
    if 0 < sampling.top_k < ids.shape[0]:
        # Equals of the last one came along: the smaller ids are kept.
        order = scaled_V[ids].sort(descending=True, stable=True).indices
        ids = ids[order[: sampling.top_k]].sort().values
    if sampling.top_p < 1.0:
        ids = _keep_top_p(ids, scaled_V[ids], sampling.top_p)
    return ids, scaled_V[ids]


def _keep_top_p(ids: Tensor, scaled: Tensor, top_p: float) -> Tensor:
    """The smallest set of most probable tokens that reaches top_p, by id.

    Tokens below (1 - top_p) / n are less than 1 - top_p together, so the others reach it without them.
    """
    probabilities = scaled.softmax(-1)
    candidates = torch.nonzero(probabilities >= (1.0 - top_p) / ids.shape[0]).flatten()
    order = candidates[scaled[candidates].sort(descending=True, stable=True).indices]
    sorted_p = probabilities[order]
    is_kept = sorted_p.cumsum(-1) - sorted_p < top_p
    is_kept[0] = True
    return ids[order[is_kept]].sort().values
