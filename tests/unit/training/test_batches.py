"""Batches: whole documents, the same for a step, weights where the model writes."""

import pytest
import torch

from tests.unit.training.small_run import ROWS, small_tokenizer
from training.batches import BatchMaker

MAKER = BatchMaker(small_tokenizer(), seed=1, prompt_share=0.1)
BOS, EOS, PAD = 0, 1, 2
END = "<｜end▁of▁sentence｜>"


def encode(text: str) -> list[int]:
    return small_tokenizer().encode(text, add_special_tokens=False).ids


def test_a_step_has_one_batch_and_steps_differ():
    first, again, other = (MAKER.make(step, ROWS).token_ids_BT for step in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_held_out_batches_are_others():
    assert not torch.equal(MAKER.make(4, ROWS).token_ids_BT, MAKER.make(4, ROWS, held_out=True).token_ids_BT)


def test_rows_hold_whole_documents_then_padding():
    batch = MAKER.make(0, ROWS)
    for row, weights in zip(batch.token_ids_BT.tolist(), batch.weights_BT.tolist(), strict=True):
        text = row[: len(row) - row[::-1].index(EOS)]
        assert text[0] == BOS
        assert set(row[len(text) :]) <= {PAD}
        assert weights[len(text) :] == [0.0] * (len(row) - len(text))
        assert len(text) > 0.7 * len(row)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<｜begin▁of▁sentence｜>plain<｜end▁of▁sentence｜>", "plain<｜end▁of▁sentence｜>"),
        (
            "<｜begin▁of▁sentence｜>S<｜User｜>q<｜Assistant｜><think>r</think>a<｜end▁of▁sentence｜>",
            "r</think>a<｜end▁of▁sentence｜>",
        ),
        (
            f"<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜></think>a{END}x</think>b{END}<｜User｜>again",
            "a<｜end▁of▁sentence｜>b<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_full_weight_is_on_what_the_model_writes(text, written):
    ids = encode(text)
    weights = MAKER.weights(ids)
    heavy = [token_id for token_id, weight in zip(ids, weights, strict=True) if weight == 1.0]
    assert small_tokenizer().decode(heavy, skip_special_tokens=False) == written
    assert set(weights) <= {0.0, 0.1, 1.0}
    assert weights[0] == 0.0
