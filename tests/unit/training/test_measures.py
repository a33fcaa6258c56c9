"""Measures of trained weights against plain counting."""

import torch

from model.reference import Reference
from tests.unit.training.small_run import ROWS, small_model, small_tokenizer
from training.batches import BatchMaker
from training.measures import accepted_drafts, measure
from training.weights import initial_weights

CONFIG = small_model()
WEIGHTS = initial_weights(CONFIG, seed=0)
MODEL = Reference(CONFIG, WEIGHTS)


def test_drafts_are_counted_against_what_greedy_decoding_wrote():
    prompt = [0, 5, 9]
    written = [*prompt]
    num_right = 0
    with torch.no_grad():
        for _ in range(12):
            written.append(int(MODEL.forward(written).logits_TV[-1].argmax()))
        for end in range(len(prompt) + 1, len(written)):
            # With `end` tokens known, the last row of the MTP layer drafts token `end`.
            drafted = int(MODEL.forward(written[:end]).mtp_logits[-1].argmax())
            num_right += drafted == written[end]
    assert accepted_drafts(MODEL, [(written, len(prompt))]) == (num_right, 11)


def test_sparse_loses_nothing_when_it_sees_everything_and_bias_shows_in_the_balance():
    skewed = {
        name: tensor + torch.linspace(0, 3, tensor.shape[0]) if name.endswith("correction_bias") else tensor
        for name, tensor in WEIGHTS.items()
    }
    batches = BatchMaker(small_tokenizer(), seed=1, prompt_share=0.1)
    found = measure(CONFIG, skewed, batches, stage=ROWS, num_batches=1)
    assert found.balance < found.balance_without_bias
    assert found.loss_sparse != found.loss_dense
