"""What training minimises, and the rule that keeps experts evenly loaded.

Letters: B sequences, T tokens, R = B * T rows, S positions, V vocabulary, E experts, K top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.reference import ReferenceOutput
from training.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How well one head predicts a batch."""

    loss: Tensor
    """(): weighted mean of -log p, in nats."""
    num_right: float
    """Weight of the tokens that greedy decoding would have got right, as a share of all."""


def next_token(output: ReferenceOutput, batch: Batch) -> Prediction:
    """The main head: row t predicts token t + 1."""
    return _predict(output.logits_TV, batch, ahead=1)


def second_next_token(output: ReferenceOutput, batch: Batch) -> Prediction:
    """The MTP head: row t predicts token t + 2."""
    if output.mtp_logits is None:
        raise ValueError("the model has no MTP layer")
    return _predict(output.mtp_logits, batch, ahead=2)


def drafts_accepted(output: ReferenceOutput, batch: Batch) -> float:
    """Share of MTP drafts that the main head's greedy choice confirms, weighted like the loss."""
    if output.mtp_logits is None:
        raise ValueError("the model has no MTP layer")
    num_rows, num_tokens = batch.token_ids_BT.shape
    chosen_BT = output.logits_TV.argmax(-1).view(num_rows, num_tokens)[:, 1:]
    drafted_BT = output.mtp_logits.argmax(-1).view(num_rows, num_tokens - 1)
    weights_BT = functional.pad(batch.weights_BT[:, 2:], (0, 1))
    return float(((chosen_BT == drafted_BT) * weights_BT).sum() / weights_BT.sum())


def _predict(logits_RV: Tensor, batch: Batch, *, ahead: int) -> Prediction:
    num_rows = len(batch.token_ids_BT)
    logits_BTV = logits_RV.view(num_rows, -1, logits_RV.shape[-1])
    num_predicted = batch.token_ids_BT.shape[1] - ahead
    logits = logits_BTV[:, :num_predicted].flatten(0, 1)
    targets = batch.token_ids_BT[:, ahead:].flatten()
    weights = batch.weights_BT[:, ahead:].flatten()
    losses = functional.cross_entropy(logits, targets, reduction="none")
    right = (logits.detach().argmax(-1) == targets) * weights
    return Prediction(
        loss=(losses * weights).sum() / weights.sum(), num_right=float(right.sum() / weights.sum())
    )


def indexer_loss(output: ReferenceOutput) -> Tensor:
    """KL(attention shares || softmax of the indexer's scores), in nats, mean over rows, summed over layers.

    With sparse attention only the selected positions count on both sides.

    Source: DeepSeek-V3.2-Exp's report, section 2.1.1.
    """
    losses = []
    for layer_idx, score_TS in output.index_scores.items():
        share_TS = output.attention_shares[layer_idx]
        is_seen_TS = share_TS > 0
        is_sparse = layer_idx in output.indexer_ids
        log_chosen_TS = (score_TS.where(is_seen_TS, -torch.inf) if is_sparse else score_TS).log_softmax(-1)
        gap_TS = torch.where(is_seen_TS, share_TS, 1.0).log() - torch.where(is_seen_TS, log_chosen_TS, 0.0)
        losses.append((share_TS * gap_TS).sum(-1).mean())
    return torch.stack(losses).sum()


def expert_rows(output: ReferenceOutput, batch: Batch, *, num_experts: int) -> dict[int, Tensor]:
    """MoE layer -> (E,) float32, rows that each expert got; start marks and padding are not counted."""
    rows = {}
    for layer_idx, ids_RK in output.expert_ids.items():
        # The MTP layer has one row less per sequence.
        num_tokens = len(ids_RK) // len(batch.weights_BT)
        is_text_R = (batch.weights_BT[:, :num_tokens] > 0).flatten()
        rows[layer_idx] = ids_RK[is_text_R].flatten().bincount(minlength=num_experts).float()
    return rows


def balance(rows: Mapping[int, Tensor]) -> float:
    """Mean over maximum of the rows per expert, averaged over layers; 1 = even."""
    return sum(float(rows_E.mean() / rows_E.max()) for rows_E in rows.values()) / len(rows)


def apply_bias_update(bias_E: Tensor, rows_E: Tensor, *, step: float) -> None:
    """Moves each expert's selection bias by a fixed step toward mean load, in place.

    Rows 9, 1, 2 of a mean of 4: the first expert's bias falls by `step`, the others' rise by it.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; arXiv 2408.15664, algorithm 1.
    """
    bias_E += step * torch.sign(rows_E.mean() - rows_E)
