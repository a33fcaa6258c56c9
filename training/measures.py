"""What the reference model shows of trained weights: drafts, sparse attention, expert load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.reference import Attention, Reference
from training import losses
from training.batches import BatchMaker
from training.config import Stage


@dataclass(frozen=True, kw_only=True)
class Measures:
    """On held-out documents."""

    loss_sparse: float
    """Nats per token."""
    loss_dense: float
    """Nats per token, the same weights with attention to every position."""
    balance: float
    """Mean over maximum of the rows per expert, averaged over MoE layers, MTP's included; 1 = even."""
    balance_without_bias: float
    """The same with every selection bias at zero."""


def measure(
    config: ModelConfig, tensors: Mapping[str, Tensor], batches: BatchMaker, *, stage: Stage, num_batches: int
) -> Measures:
    """Runs held-out batches of a stage's shape four ways."""
    no_bias = {
        name: torch.zeros_like(tensor) if name.endswith("e_score_correction_bias") else tensor
        for name, tensor in tensors.items()
    }
    model, unbalanced = Reference(config, tensors), Reference(config, no_bias)
    loss_sparse, rows = _run(model, batches, stage, num_batches, "sparse")
    loss_dense, _ = _run(model, batches, stage, num_batches, "dense")
    _, rows_without = _run(unbalanced, batches, stage, num_batches, "sparse")
    return Measures(
        loss_sparse=loss_sparse,
        loss_dense=loss_dense,
        balance=losses.balance(rows),
        balance_without_bias=losses.balance(rows_without),
    )


def _run(
    model: Reference, batches: BatchMaker, stage: Stage, num_batches: int, attention: Attention
) -> tuple[float, dict[int, Tensor]]:
    """Mean loss, and per MoE layer the rows of each expert, padding left out."""
    total = 0.0
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for step in range(num_batches):
            batch = batches.make(step, stage, held_out=True)
            output = model.forward(batch.token_ids_BT, attention=attention)
            total += float(losses.next_token(output, batch).loss)
            counted = losses.expert_rows(output, batch, num_experts=model.config.n_routed_experts)
            for layer_idx, rows_E in counted.items():
                rows[layer_idx] = rows.get(layer_idx, torch.zeros(())) + rows_E
    return total / num_batches, rows


def accepted_drafts(model: Reference, documents: Sequence[tuple[Sequence[int], int]]) -> tuple[int, int]:
    """How many first drafts greedy decoding would have accepted: (accepted, drafted).

    Args:
        model: with an MTP layer.
        documents: (prompt and greedy text as token ids, number of prompt tokens).
    """
    num_accepted = num_drafted = 0
    with torch.no_grad():
        for token_ids, num_prompt in documents:
            drafts_TV = model.forward(token_ids).mtp_logits
            if drafts_TV is None:
                raise ValueError("the model has no MTP layer")
            # Row i drafts token i + 2 once token i + 1 is known; the first new token is never drafted.
            drafted = drafts_TV.argmax(-1).tolist()[num_prompt - 1 : len(token_ids) - 2]
            written = list(token_ids[num_prompt + 1 :])
            num_drafted += len(written)
            num_accepted += sum(draft == token for draft, token in zip(drafted, written, strict=True))
    return num_accepted, num_drafted
