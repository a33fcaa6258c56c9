"""A tokenizer of single bytes with V3.2's special tokens: any text round-trips, whatever the model learnt.

Ids: 0 begin of sentence, 1 end of sentence, 2 padding, 3 to 258 the bytes 0 to 255, then the chat's markup.
"""

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIRST_BYTE_ID = 3
"""Id of byte 0."""

MARKUP = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<|EOT|>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""Tokens of the chat encoding; text to a decoder, as in V3.2's own tokenizer, hence not "special"."""

NUM_TOKENS = FIRST_BYTE_ID + 256 + len(MARKUP)
"""Size of the vocabulary."""


def make_tokenizer() -> Tokenizer:
    """The tokenizer, ready to encode and to save as tokenizer.json."""
    vocabulary = {BOS: 0, EOS: 1, PAD: 2} | _byte_ids()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    return tokenizer


def tokenizer_config(*, max_tokens: int) -> Mapping[str, object]:
    """What tokenizer_config.json says of it; max_tokens is the model's context."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": max_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }


def _byte_ids() -> dict[str, int]:
    """The character that stands for each byte -> its id.

    A printable byte stands for itself, the others are moved to 256 and up in order: byte 0 is U+0100.

    Source: GPT-2's byte-level encoding (openai/gpt-2, src/encoder.py), which `tokenizers` reproduces.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(moved)}
    return {characters[byte]: FIRST_BYTE_ID + byte for byte in range(256)}
