"""Text comes out in whole characters, and all pieces together are the text of all tokens."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.front.tokenizer import PromptTokenizer, TextStream, TokenizerStore, load_tokenizer
from router.requests.members import ModelFacts
from wire.errors import InvalidRequest

BOS, EOS = 0, 1


def byte_tokenizer() -> Tokenizer:
    """One token a byte, plus tokens that join or split characters, plus two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": BOS, "<eos>": EOS} | {char: 2 + idx for idx, char in enumerate(alphabet)}
    merges = [("h", "e"), ("Ã", "©"), ("â", "Ĥ"), ("¬", "Ġ"), ("ð", "Ł")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


@pytest.fixture(scope="module")
def plain() -> PromptTokenizer:
    return PromptTokenizer(tokenizer=byte_tokenizer(), bos_token_id=None)


def cut(ids, sizes):
    """The ids in chunks of the sizes given, the rest one by one."""
    chunks, position = [], 0
    for size in sizes:
        chunks.append(tuple(ids[position : position + size]))
        position += size
    return chunks + [(token_id,) for token_id in ids[position:]]


def stream(tokenizer, chunks):
    text = TextStream(tokenizer)
    return [*(text.push(chunk) for chunk in chunks), text.finish()]


@given(text=st.text(), sizes=st.lists(st.integers(0, 5), max_size=6))
def test_pieces_of_any_text_join_to_it_and_never_split_a_character(plain, text, sizes):
    pieces = stream(plain, cut(plain.encode(text), sizes))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 262), max_size=40), sizes=st.lists(st.integers(0, 5), max_size=6))
def test_pieces_of_any_tokens_join_to_the_text_of_all_of_them(plain, ids, sizes):
    assert "".join(stream(plain, cut(ids, sizes))) == plain.decode(ids)


@settings(max_examples=20)
@given(ids=st.lists(st.sampled_from([100, 150, 200, 230, BOS, 258, 260, 262]), min_size=80, max_size=300))
def test_long_runs_of_broken_bytes_join_too(plain, ids):
    assert "".join(stream(plain, [(token_id,) for token_id in ids])) == plain.decode(ids)


@pytest.mark.parametrize("num_broken", range(48, 66))
@pytest.mark.parametrize("num_between", [0, 1, 6, 7, 8, 9, 70])
def test_long_window_is_not_cut_inside_a_character(plain, num_broken, num_between):
    """Lone continuation bytes fill the window; then a euro sign with silent special tokens inside it."""
    broken, first, second, third = (plain.tokenizer.token_to_id(char) for char in ("Ģ", "â", "Ĥ", "¬"))
    ids = [*[broken] * num_broken, first, *[BOS] * num_between, second, *[BOS] * num_between, third]
    pieces = stream(plain, [(token_id,) for token_id in ids])
    assert "".join(pieces) == plain.decode(ids) == "\ufffd" * num_broken + "€"


def test_endless_replacement_characters_do_not_pile_up(plain):
    text = TextStream(plain)
    ids = plain.encode("\ufffd" * 300)
    pieces = [text.push((token_id,)) for token_id in ids]
    assert len(text._window) <= 80
    assert "".join(pieces) + text.finish() == "\ufffd" * 300


def test_character_comes_with_its_last_byte(plain):
    tokens = [plain.tokenizer.token_to_id(char) for char in ("â", "Ĥ", "¬")]
    assert stream(plain, [(token_id,) for token_id in tokens]) == ["", "", "€", ""]


def test_unfinished_character_shows_at_the_end_only(plain):
    tokens = [plain.tokenizer.token_to_id(char) for char in ("h", "â")]
    assert stream(plain, [(token_id,) for token_id in tokens]) == ["h", "", "\ufffd"]


def test_special_tokens_are_left_out_of_text(plain):
    assert stream(plain, [(BOS, *plain.encode("he"), EOS)]) == ["he", ""]


def test_no_tokenizer_gives_no_text():
    assert stream(None, [(5, 6), (7,)]) == ["", "", ""]


@pytest.mark.parametrize(
    ("text", "ids"), [("hi", [BOS, "h", "i"]), ("<bos>hi", [BOS, "h", "i"]), ("", [BOS])]
)
def test_bos_is_put_before_a_prompt_once(text, ids):
    tokenizer = PromptTokenizer(tokenizer=byte_tokenizer(), bos_token_id=BOS)
    wanted = [tokenizer.tokenizer.token_to_id(item) if isinstance(item, str) else item for item in ids]
    assert list(tokenizer.encode(text)) == wanted


def facts(path):
    return ModelFacts(
        name="toy",
        path=str(path),
        fingerprint="f",
        vocab_tokens=300,
        max_context_tokens=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def save(folder, config):
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "bos"),
    [({"add_bos_token": True}, BOS), ({"add_bos_token": False}, None), ({}, None), (None, None)],
)
def test_tokenizer_config_says_whether_bos_is_added(tmp_path, config, bos):
    save(tmp_path, config)
    loaded = load_tokenizer(facts(tmp_path))
    assert isinstance(loaded, PromptTokenizer)
    assert loaded.bos_token_id == bos


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_text_without_a_readable_tokenizer_is_refused_with_a_way_out(tmp_path, content, caplog):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    async def main():
        store = TokenizerStore()
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="send the prompt as tokens") as caught:
                await store.encode("hello", facts(tmp_path))
            assert caught.value.field == "text"
        assert await store.find(facts(tmp_path)) is None

    asyncio.run(main())
    assert len(caplog.records) == 1


def test_checkpoint_of_another_host_is_no_tokenizer(tmp_path):
    assert "finds no tokenizer.json" in load_tokenizer(facts(tmp_path / "elsewhere"))
    assert "no path" in load_tokenizer(facts(""))


def test_store_encodes_with_the_models_tokenizer(tmp_path):
    save(tmp_path, {"add_bos_token": True})

    async def main():
        store = TokenizerStore()
        return await store.encode("hi", facts(tmp_path)), await store.find(facts(tmp_path))

    ids, found = asyncio.run(main())
    assert ids[0] == BOS
    assert found.decode(list(ids)) == "hi"
