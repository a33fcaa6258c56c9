"""What changes logits before a token is chosen, greedy or not; docs/sampling.md has the whole order."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.types import Sampling, SequenceSpec


def adjust_logits(logits_V: Tensor, spec: SequenceSpec, token_ids: Sequence[int]) -> Tensor:
    """Logits with what may not follow masked, biases added and penalties applied, in this order.

    Example: token 4 stands twice in the output, its logit is 3.0; repetition_penalty 1.5, presence_penalty
    0.5 and frequency_penalty 0.25 make it 3.0 / 1.5 - 0.5 - 2 * 0.25 = 1.0.

    Args:
        logits_V: (V,) float32; not changed.
        spec: of the sequence; says where its output begins.
        token_ids: prompt and output so far.

    Returns:
        (V,) float64.

    Raises:
        GrammarTooComplex: what may follow is not known.

    Source: vLLM, vllm/v1/sample/sampler.py (the order), vllm/model_executor/layers/utils.py (penalties).
    """
    sampling = spec.sampling
    adjusted_V = logits_V.to(torch.float64, copy=True)
    output_ids = token_ids[spec.num_prompt_tokens :]
    if spec.matcher is not None:
        allowed_V = spec.matcher.allowed(output_ids)
        if allowed_V is not None:
            adjusted_V.masked_fill_(~allowed_V.to(logits_V.device), float("-inf"))
    if len(output_ids) < sampling.min_tokens and spec.stop_token_ids:
        _mask_end(adjusted_V, spec.stop_token_ids)
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        adjusted_V[list(ids)] += adjusted_V.new_tensor(biases)
    if sampling.repetition_penalty != 1.0:
        _penalize_repetition(adjusted_V, token_ids, penalty=sampling.repetition_penalty)
    if output_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        _penalize_output(adjusted_V, output_ids, sampling)
    return adjusted_V


def _penalize_repetition(logits_V: Tensor, token_ids: Sequence[int], *, penalty: float) -> None:
    """Makes every token that is there less probable (penalty > 1), whatever the sign of its logit."""
    seen = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device=logits_V.device)
    logits = logits_V[seen]
    logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)


def _penalize_output(logits_V: Tensor, output_ids: Sequence[int], sampling: Sampling) -> None:
    """Takes from the tokens of the output, touching no other: a vocabulary is larger than most outputs."""
    id_to_count = Counter(output_ids)
    ids = torch.tensor(list(id_to_count), dtype=torch.int64, device=logits_V.device)
    counts = logits_V.new_tensor(list(id_to_count.values()))
    logits_V[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _mask_end(logits_V: Tensor, stop_token_ids: frozenset[int]) -> None:
    """Masks the tokens that end a sequence, unless a grammar that is complete leaves nothing else."""
    masked_V = logits_V.clone()
    masked_V[sorted(stop_token_ids)] = float("-inf")
    if not bool(masked_V.isneginf().all()):
        logits_V.copy_(masked_V)
