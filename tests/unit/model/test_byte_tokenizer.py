import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.byte_tokenizer import BOS, EOS, MARKUP, NUM_TOKENS, make_tokenizer

TOKENIZER = make_tokenizer()


def _encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(_encode(text), skip_special_tokens=False) == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<｜"), max_size=40))
def test_a_token_is_a_byte_and_its_id_is_the_byte_plus_three(text: str) -> None:
    assert _encode(text) == [byte + 3 for byte in text.encode()]


@pytest.mark.parametrize(("text", "token_id"), [(BOS, 0), (EOS, 1), ("<｜User｜>", 259), ("<think>", 261)])
def test_markup_is_one_token(text: str, token_id: int) -> None:
    assert _encode(f"a{text}b") == [100, token_id, 101]


def test_markup_survives_decoding_and_sentence_marks_do_not() -> None:
    ids = _encode(f"{BOS}<｜User｜>hi<｜Assistant｜><think>x</think>｜DSML｜{EOS}")
    assert TOKENIZER.decode(ids) == "<｜User｜>hi<｜Assistant｜><think>x</think>｜DSML｜"


def test_vocabulary_is_dense() -> None:
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(NUM_TOKENS))
    assert len(set(MARKUP)) == len(MARKUP)
