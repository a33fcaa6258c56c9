"""The sampler: logits to a token, from a generator keyed by (seed, position), never by call order.

So the same request gives the same text in any batch, on any worker, before and after a replay.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from workers.attention.types import Sampling


def sample_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], *, positions: Sequence[int]) -> list[int]:
    """The next token of each request, as `sample_token` chooses it; all greedy ones at once.

    Args:
        logits_BV: (B, V) float32.
        samplings: B of them.
        positions: B of them, of the new tokens behind the clients' prompts.
    """
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True)):
        if sampling.temperature != 0.0:
            tokens[row] = sample_token(logits_BV[row], sampling, position=position)
    return tokens


def sample_token(logits_V: Tensor, sampling: Sampling, *, position: int) -> int:
    """The next token.

    Args:
        logits_V: (V,) float32.
        sampling: how to choose; temperature 0 takes the first maximum, and so do logits without a finite
            maximum, which have no softmax.
        position: index of the new token behind the client's prompt, from 0.
    """
    if sampling.temperature == 0.0 or not bool(logits_V.max().isfinite()):
        return int(logits_V.argmax())
    kept_V = _keep_probable(
        logits_V.double() / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    cumulative_V = kept_V.softmax(-1).cumsum(-1).cpu()
    # The total is 1 up to rounding; scaling the draw keeps it below the last kept token's end.
    drawn = _uniform(sampling.seed, position) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V, drawn, right=True))


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from a hash: torch's CPU generator keeps 32 bits of a seed."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _keep_probable(scaled_V: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits outside the top-k and outside the smallest set that reaches top_p become -inf."""
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    if top_k > 0:
        sorted_V[top_k:] = float("-inf")
    probability_V = sorted_V.softmax(-1)
    drop_V = (probability_V.cumsum(-1) - probability_V >= top_p) | sorted_V.isneginf()
    drop_V[0] = False
    return scaled_V.masked_fill(torch.zeros_like(drop_V).scatter(0, order_V, drop_V), float("-inf"))
