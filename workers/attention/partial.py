"""The index of pages that share a beginning with tokens behind a known prefix: what can be copied of them.

A shared page is never written, so a sequence that leaves a cached page in its middle copies the rows up to
there into a page of its own and goes on behind them (copy on write). Rows are equal where tokens and forms
of attention are (wire/prefix.py).
"""

from dataclasses import dataclass

from wire.prefix import PrefixRules

_MAX_CHILDREN = 32
"""Pages that are remembered behind one prefix; the newest."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokens of one page, and where in their sequence they stand."""

    token_ids: tuple[int, ...]
    first_position: int
    num_prompt_tokens: int
    """Of the sequence: tokens behind them are generated."""


class PartialIndex:
    """Published pages by the hash of the page before them; the engine thread is its only user."""

    def __init__(self, rules: PrefixRules) -> None:
        self._rules = rules
        self._children: dict[bytes, dict[bytes, Texts]] = {}
        self._parent_of: dict[bytes, bytes] = {}

    def add(self, parent: bytes, digest: bytes, texts: Texts) -> None:
        """A page was published behind `parent`."""
        children = self._children.setdefault(parent, {})
        if digest in children:
            return
        children[digest] = texts
        self._parent_of[digest] = parent
        if len(children) > _MAX_CHILDREN:
            self.forget(next(iter(children)))

    def forget(self, digest: bytes) -> None:
        """A page was given away, or is one too many; nothing where it is not known."""
        parent = self._parent_of.pop(digest, None)
        if parent is None:
            return
        children = self._children[parent]
        del children[digest]
        if not children:
            del self._children[parent]

    def find(self, parent: bytes, texts: Texts) -> tuple[bytes, int] | None:
        """The page with the longest equal beginning, and its length in tokens; None = not one token."""
        best: tuple[bytes, int] | None = None
        for digest, other in self._children.get(parent, {}).items():
            num_equal = self._num_equal(texts, other)
            if num_equal > (best[1] if best else 0):
                best = (digest, num_equal)
        return best

    def _num_equal(self, one: Texts, other: Texts) -> int:
        num_tokens = 0
        for left, right in zip(one.token_ids, other.token_ids, strict=False):
            if left != right:
                break
            num_tokens += 1
        prompts = sorted((one.num_prompt_tokens, other.num_prompt_tokens))
        # Between the two ends of prompts the forms differ, up to the position from which all are the same.
        differs_from = max(prompts[0], one.first_position)
        if differs_from < min(prompts[1], self._rules.index_topk):
            num_tokens = min(num_tokens, differs_from - one.first_position)
        return num_tokens
