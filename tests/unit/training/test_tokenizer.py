"""The tokenizer of the trained model: any text round-trips, markup and fixed passages are one token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.byte_tokenizer import BOS, EOS, MARKUP, PAD
from tests.unit.training.small_run import NUM_TOKENS, small_tokenizer
from training.tokenizer import FIXED_PASSAGES


def encode(text: str) -> list[int]:
    return small_tokenizer().encode(text, add_special_tokens=False).ids


@given(st.text())
def test_any_text_round_trips(text):
    assert small_tokenizer().decode(encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [*MARKUP, *FIXED_PASSAGES])
def test_markup_and_fixed_passages_are_one_token_and_survive_decoding(text):
    assert len(encode(text)) == 1
    assert small_tokenizer().decode(encode(text)) == text


def test_sentence_marks_have_the_ids_of_the_config():
    assert [encode(mark) for mark in (BOS, EOS, PAD)] == [[0], [1], [2]]


def test_digits_are_tokens_of_their_own():
    pieces = small_tokenizer().encode("a 1234 b", add_special_tokens=False).tokens
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "2", "3", "4"]


def test_vocabulary_fits_the_model():
    assert small_tokenizer().get_vocab_size() <= NUM_TOKENS
