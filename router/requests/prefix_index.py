"""What this router believes each worker's KV cache holds: which prompts begin with pages that are there.

Learned from what was routed; a worker says with its first token how many tokens it really reused. A worker
gives the longest unused pages away, the end of a text before its beginning, and so does the index, up to the
worker's number of pages. A page that was expected and is gone therefore takes with it all that is as old.

Prompts only: generated tokens may be cached in another form (wire/prefix.py). A wrong guess costs time and
never a token: workers look for themselves. No clock and no I/O.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from wire.errors import InternalError
from wire.prefix import page_hash

_ROOT = b""


@dataclass(frozen=True)
class PageChain:
    """The full pages of a prompt, each known by the hash of all tokens up to its end."""

    digests: tuple[bytes, ...]
    page_tokens: int
    num_tokens: int
    """Tokens of the prompt."""

    @property
    def num_reusable(self) -> int:
        """Pages that a worker would take from its cache: it computes one token at least."""
        return min(len(self.digests), (self.num_tokens - 1) // self.page_tokens) if self.digests else 0


def chain_of(token_ids: Sequence[int], page_tokens: int) -> PageChain:
    """The chain of a prompt; without pages while their length is not known (0).

    >>> len(chain_of([1, 2, 3, 4, 5], 2).digests)
    2
    """
    digests: list[bytes] = []
    for begin in range(0, len(token_ids) - page_tokens + 1, page_tokens) if page_tokens else ():
        parent = digests[-1] if digests else _ROOT
        digests.append(page_hash(parent, token_ids[begin : begin + page_tokens]))
    return PageChain(tuple(digests), page_tokens, len(token_ids))


@dataclass(frozen=True)
class Cached:
    """What a worker is believed to hold of a prompt."""

    num_tokens: int = 0
    """Tokens that it would take from its cache."""
    last_use: int = 0
    """Turn of the index in which the last of their pages was used."""


class PrefixIndex:
    """Pages by worker, the longest unused first; a page is never there without the one before it."""

    def __init__(self, *, max_pages: int) -> None:
        """Takes the pages that are remembered of one worker at most; 0 remembers none."""
        self._max_pages = max_pages
        self._turn = 0
        self._pages: dict[str, OrderedDict[bytes, tuple[bytes, int]]] = {}
        """Of each worker: page -> (the page before it, the turn of its last use)."""

    def num_pages(self, key: str) -> int:
        """Pages remembered of a worker."""
        return len(self._pages.get(key, ()))

    def look_up(self, key: str, chain: PageChain) -> Cached:
        """What a worker would take of a prompt from its cache."""
        pages = self._pages.get(key)
        if not pages:
            return Cached()
        # A page is there only with all before it, so the first that is missing can be searched for by halves.
        low, high = 0, chain.num_reusable
        while low < high:
            middle = (low + high) // 2
            if chain.digests[middle] in pages:
                low = middle + 1
            else:
                high = middle
        return Cached(low * chain.page_tokens, pages[chain.digests[low - 1]][1]) if low else Cached()

    def learn(self, key: str, chain: PageChain, *, num_pages: int) -> None:
        """A worker with so many pages gets this prompt; what it has not used for longest goes."""
        pages = self._pages.setdefault(key, OrderedDict())
        self._turn += 1
        for idx in reversed(range(len(chain.digests))):
            pages[chain.digests[idx]] = (chain.digests[idx - 1] if idx else _ROOT, self._turn)
            pages.move_to_end(chain.digests[idx])
        while len(pages) > min(num_pages, self._max_pages):
            pages.popitem(last=False)

    def correct(self, key: str, expected: Cached, *, num_found: int) -> None:
        """A worker took `num_found` tokens of a prompt from its cache, where others were expected.

        Args:
            key: the worker.
            expected: what `look_up` gave before the prompt was learned.
            num_found: what the worker says.
        """
        if num_found >= expected.num_tokens:
            return
        pages = self._pages.get(key, OrderedDict())
        while pages and next(iter(pages.values()))[1] <= expected.last_use:
            pages.popitem(last=False)

    def drop_absent(self, present: Collection[str]) -> None:
        """Forgets workers that left, or that are another process now."""
        for key in [key for key in self._pages if key not in present]:
            del self._pages[key]

    def check_integrity(self) -> None:
        """Every page is there with the one before it, oldest first, and no worker has too many.

        Raises:
            InternalError: naming the worker whose pages are wrong.
        """
        for key, pages in self._pages.items():
            is_chained = all(parent == _ROOT or parent in pages for parent, _ in pages.values())
            turns = [turn for _, turn in pages.values()]
            if not is_chained or turns != sorted(turns) or len(pages) > self._max_pages:
                raise InternalError(f"prefix index of {key}: its {len(pages)} pages are out of order")
