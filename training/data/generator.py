"""Endless streams of documents, one for training and one that training never sees."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from training.data.arithmetic import make_arithmetic
from training.data.json_answers import make_json
from training.data.prose import make_fact, make_small_talk, make_story
from training.data.tool_loops import make_tool_loop
from training.data.tools import make_tool
from training.data.types import Item, Kind, PlainText

SHARES: Mapping[Kind, float] = MappingProxyType(
    {
        "arithmetic": 0.36,
        "tool": 0.2,
        "tool_loop": 0.12,
        "json": 0.14,
        "story": 0.07,
        "fact": 0.06,
        "small_talk": 0.05,
    }
)
"""Kind -> share of the documents."""
_MAKERS: Mapping[Kind, Callable[[random.Random], Item]] = MappingProxyType(
    {
        "arithmetic": make_arithmetic,
        "tool": make_tool,
        "tool_loop": make_tool_loop,
        "json": make_json,
        "story": make_story,
        "fact": make_fact,
        "small_talk": make_small_talk,
    }
)
_ALWAYS_TRAINED: tuple[Kind, ...] = ("fact", "small_talk")
"""Kinds of few prompts, to be known by heart; they are not scored."""
_HELD_OUT_OF = 16
"""One prompt of so many is kept for the held-out side."""


def items(*, seed: int, held_out: bool, kinds: Sequence[Kind] | None = None) -> Iterator[Item]:
    """Documents without end, the same for the same seed.

    Args:
        seed: any whole number.
        held_out: the side whose prompts training never sees, whatever the seeds: a prompt's own hash decides
            which side it is on.
        kinds: only these, in the shares they have to each other.
    """
    rng = random.Random(seed)
    chosen = list(kinds or SHARES)
    shares = [SHARES[kind] for kind in chosen]
    while True:
        kind = rng.choices(chosen, shares)[0]
        item = _MAKERS[kind](rng)
        if is_held_out(item) == held_out or (kind in _ALWAYS_TRAINED and kinds is None):
            yield item


def is_held_out(item: Item) -> bool:
    """Whether the prompt belongs to the held-out side."""
    digest = hashlib.blake2b(_prompt(item).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_OF == 0


def _prompt(item: Item) -> str:
    if isinstance(item, PlainText):
        return item.text.partition(".")[0]
    return str(item.messages[item.last_asked]["content"])
