"""The tokenizer of moray-nano: byte-level BPE with V3.2's special tokens, digits one by one.

What the chat format repeats to the letter (how to call tools, the tags around calls and results, the frame
of a JSON schema) is one token each: a small model's context is better spent on what differs. Their text
round-trips like any other.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.byte_tokenizer import BOS, EOS, MARKUP, PAD
from router.front.chat import markup

FIXED_PASSAGES = (
    markup.TOOLS_HEAD,
    markup.TOOLS_TAIL,
    markup.RESPONSE_FORMAT_HEAD,
    markup.CALLS_OPEN,
    markup.CALLS_CLOSE,
    markup.INVOKE_OPEN,
    markup.INVOKE_CLOSE,
    markup.PARAMETER_OPEN,
    '" string="true">',
    '" string="false">',
    markup.PARAMETER_CLOSE,
    markup.RESULTS_OPEN,
    markup.RESULTS_CLOSE,
    "<result>",
    "</result>",
    '{"type": "object", "properties": {',
    '{"type": "string"}',
    '{"type": "integer"}',
)
"""What prompts and calls repeat to the letter."""


def train_tokenizer(texts: Iterable[str], *, num_tokens: int) -> Tokenizer:
    """A tokenizer whose merges are learnt from texts.

    Args:
        texts: documents in the chat encoding; markup and fixed passages in them teach nothing.
        num_tokens: size of the vocabulary, every special token included.
    """
    fixed = (*MARKUP, *FIXED_PASSAGES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - len(fixed),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without(text, fixed)), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed])
    return tokenizer


def _without(text: str, fixed: tuple[str, ...]) -> list[str]:
    pieces = [text]
    for passage in (BOS, EOS, *sorted(fixed, key=len, reverse=True)):
        pieces = [part for piece in pieces for part in piece.split(passage)]
    return pieces
