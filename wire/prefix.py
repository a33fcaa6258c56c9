"""Hash-chained prefixes: a page's hash covers its tokens, how they were computed, and every page before it.

Two sequences whose pages have the same hash have the same bits in them. Those bits depend on each token's
form of attention too (docs/adr/0010): generated tokens that see at most index_topk positions are computed in
another form than prompt tokens, so a page counts how many of its tokens are such.

Example: pages of 4 tokens, index_topk 8, prompt [1, 2, 3, 4, 5], then 6, 7, 8 generated. The first page is
the same as that of a longer prompt [1, 2, 3, 4, ...]; the second, of 5 to 8, has 3 generated tokens, so a
prompt of all eight tokens hits the first page only, and a replay of this very request hits both.
"""

import array
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_HASH_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class PrefixRules:
    """What tells one chain of hashes from another."""

    page_tokens: int
    """Tokens of one page, >= 1."""
    cache_form: str
    """How cached rows are held: rows of another form have other bits."""
    index_topk: int
    """Generated tokens at positions from here on are computed as prompt tokens are."""

    def root(self) -> bytes:
        """The hash before the first page."""
        salt = f"moray prefix, {self.page_tokens} tokens, {self.cache_form}"
        return hashlib.blake2b(salt.encode(), digest_size=_HASH_BYTES).digest()


def page_hash(parent: bytes, token_ids: Sequence[int], *, num_generated: int = 0) -> bytes:
    """The hash of a full page.

    Args:
        parent: hash of the page before it, or `PrefixRules.root`.
        token_ids: its tokens.
        num_generated: how many of them were computed as generated tokens, at positions below index_topk.
    """
    page = array.array("i", [num_generated, *token_ids])
    return hashlib.blake2b(parent + page.tobytes(), digest_size=_HASH_BYTES).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], *, num_prompt_tokens: int, rules: PrefixRules
) -> None:
    """Appends to `hashes` those of the full pages of `token_ids` that are not in it yet.

    Args:
        hashes: of the first pages of the same tokens; grows in place.
        token_ids: every token of the sequence so far.
        num_prompt_tokens: leading tokens that are its client's prompt.
        rules: of the chain.
    """
    length = rules.page_tokens
    for begin in range(len(hashes) * length, len(token_ids) - length + 1, length):
        num_generated = max(min(begin + length, rules.index_topk) - max(begin, num_prompt_tokens), 0)
        parent = hashes[-1] if hashes else rules.root()
        hashes.append(page_hash(parent, token_ids[begin : begin + length], num_generated=num_generated))
