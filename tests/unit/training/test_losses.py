"""Losses against plain sums, and the rule that balances experts."""

from dataclasses import replace

import pytest
import torch

from model.reference import Reference
from tests.unit.training.small_run import ROWS, small_model, small_tokenizer
from training import losses
from training.batches import Batch, BatchMaker
from training.weights import initial_weights

CONFIG = small_model()
WEIGHTS = initial_weights(CONFIG, seed=0)
MODEL = Reference(CONFIG, WEIGHTS)
BATCH = BatchMaker(small_tokenizer(), seed=1, prompt_share=0.1).make(0, ROWS)


def forward(attention: str):
    """With gradients, which only the test of the gradients follows."""
    return MODEL.forward(BATCH.token_ids_BT, attention=attention)


def value(loss: torch.Tensor) -> float:
    return float(loss.detach())


@pytest.mark.parametrize(("predict", "ahead"), [(losses.next_token, 1), (losses.second_next_token, 2)])
def test_loss_is_the_weighted_mean_over_what_comes_next(predict, ahead):
    output = forward("dense")
    logits = output.logits_TV if ahead == 1 else output.mtp_logits
    rows = logits.view(ROWS.num_rows, -1, CONFIG.vocab_size).log_softmax(-1)
    total = weight = 0.0
    for row in range(ROWS.num_rows):
        for place in range(ROWS.row_tokens - ahead):
            share = float(BATCH.weights_BT[row, place + ahead])
            total -= share * float(rows[row, place, BATCH.token_ids_BT[row, place + ahead]].detach())
            weight += share
    assert value(predict(output, BATCH).loss) == pytest.approx(total / weight, rel=1e-4)


def test_first_loss_is_that_of_a_guess():
    guess = float(torch.tensor(float(CONFIG.vocab_size)).log())
    assert value(losses.next_token(forward("dense"), BATCH).loss) == pytest.approx(guess, rel=0.1)


@pytest.mark.parametrize("attention", ["dense with indexer", "sparse"])
def test_indexer_loss_is_zero_where_it_predicts_attention_and_above_elsewhere(attention):
    output = forward(attention)
    shares = {layer: share.clamp(min=1e-30) for layer, share in output.attention_shares.items()}
    perfect = replace(output, index_scores={layer: share.log() for layer, share in shares.items()})
    assert value(losses.indexer_loss(perfect)) == pytest.approx(0.0, abs=1e-4)
    assert value(losses.indexer_loss(output)) > 0.001


def test_indexer_loss_moves_the_indexer_alone():
    loss = losses.indexer_loss(forward("dense with indexer"))
    named = [(name, tensor) for name, tensor in WEIGHTS.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(loss, [tensor for _, tensor in named], allow_unused=True)
    moved = {name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None}
    assert moved
    assert all(".indexer." in name for name in moved)


def test_rows_of_padding_and_start_marks_are_not_counted():
    output = forward("dense")
    rows = losses.expert_rows(output, BATCH, num_experts=CONFIG.n_routed_experts)
    num_text = int((BATCH.weights_BT > 0).sum())
    main_layer, mtp_layer = sorted(rows)
    assert int(rows[main_layer].sum()) == num_text * CONFIG.num_experts_per_tok
    assert int(rows[mtp_layer].sum()) <= num_text * CONFIG.num_experts_per_tok


def test_bias_moves_a_fixed_step_toward_mean_load():
    bias_E = torch.tensor([0.0, 0.1, 0.0])
    losses.apply_bias_update(bias_E, torch.tensor([9.0, 1.0, 2.0]), step=0.002)
    torch.testing.assert_close(bias_E, torch.tensor([-0.002, 0.102, 0.002]))


def test_balance_is_mean_over_max():
    assert losses.balance({1: torch.tensor([4.0, 2.0]), 2: torch.tensor([3.0, 3.0])}) == pytest.approx(0.875)


def test_model_that_drafts_what_it_says_is_accepted():
    output = forward("dense")
    rows = output.logits_TV.view(ROWS.num_rows, -1, CONFIG.vocab_size)
    same = replace(output, mtp_logits=rows[:, 1:].flatten(0, 1))
    assert losses.drafts_accepted(same, BATCH) == pytest.approx(1.0)
    assert losses.drafts_accepted(output, BATCH) < 1.0


def test_model_without_mtp_layer_is_refused():
    output = replace(forward("dense"), mtp_logits=None)
    with pytest.raises(ValueError, match="MTP"):
        losses.second_next_token(output, Batch(token_ids_BT=BATCH.token_ids_BT, weights_BT=BATCH.weights_BT))
