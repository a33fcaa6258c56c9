"""The gate: which experts a token goes to, and with what weight.

Letters: T tokens, D hidden, E logical experts, G groups, K top-k.
"""

import math

import torch
from torch import Tensor

from model.activations import sigmoid
from model.config import ModelConfig
from model.linear import linear

WEIGHT_FLOOR = 1e-20
"""Added to the sum that weights are divided by: sigmoids that all underflow give weight 0, not NaN."""


def select_experts(
    x_TD: Tensor, gate_weight_ED: Tensor, bias_E: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Top-k experts by biased score within the best groups, weighted by unbiased score (noaux_tc).

    Example: scores (0.9, 0.1 | 0.6, 0.5), no bias, one of two groups kept, top 1: the groups' two best sum to
    1.0 and 1.1, so expert 2 is chosen although 0 scores highest; its weight is routed_scaling_factor.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; dropped groups count as -inf, because a biased
    score can be negative.

    Args:
        x_TD: (T, D) float32.
        gate_weight_ED: (E, D) float32.
        bias_E: (E,) float32, e_score_correction_bias: moves the choice, never the weights.
        config: n_group, topk_group, num_experts_per_tok, routed_scaling_factor.

    Returns:
        ids_TK: (T, K) int32, by descending biased score.
        weights_TK: (T, K) float32, each row sums to routed_scaling_factor.
    """
    score_TE = sigmoid(linear(x_TD, gate_weight_ED))
    choice_TE = _keep_best_groups(score_TE + bias_E, config)
    ids_TK = choice_TE.topk(config.num_experts_per_tok, dim=-1).indices
    chosen_TK = score_TE.gather(1, ids_TK)
    weights_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + WEIGHT_FLOOR) * config.routed_scaling_factor
    return ids_TK.to(torch.int32), weights_TK


def _keep_best_groups(choice_TE: Tensor, config: ModelConfig) -> Tensor:
    """(T, E) with -inf in all but the topk_group groups whose two best scores have the largest sum."""
    choice_TGX = choice_TE.view(len(choice_TE), config.n_group, -1)
    group_TG = choice_TGX.topk(2, dim=-1).values.sum(-1)
    kept_TG = group_TG.topk(config.topk_group, dim=-1).indices
    dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TG, value=False)
    kept_TE: Tensor = choice_TGX.masked_fill(dropped_TG[:, :, None], -math.inf).flatten(1)
    return kept_TE
