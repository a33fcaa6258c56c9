"""Accounts of KV pages: who owns which; no tensors here.

A page is a fixed number of tokens of all layers. With 4 pages of 16 tokens a request of 33 tokens owns 3
pages, and a second one of 17 tokens must wait until they are released.
"""

from collections.abc import Hashable


class PageAllocator:
    """Hands out page indices; the engine thread is its only user."""

    def __init__(self, num_pages: int, *, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[Hashable, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def can_reserve(self, num_tokens: int) -> bool:
        """Whether `reserve` would succeed."""
        return self.pages_for(num_tokens) <= len(self._free)

    def reserve(self, owner: Hashable, *, num_tokens: int) -> tuple[int, ...]:
        """Page indices for `num_tokens` tokens, in token order.

        Raises:
            RuntimeError: too few free pages, or the owner has some already: the caller did not look.
        """
        num_wanted = self.pages_for(num_tokens)
        if num_wanted > len(self._free) or owner in self._owned:
            raise RuntimeError(f"{owner} wants {num_wanted} pages; {len(self._free)} are free")
        pages = tuple(self._free.pop() for _ in range(num_wanted))
        self._owned[owner] = pages
        return pages

    def release(self, owner: Hashable) -> None:
        """Frees what an owner has; nothing when it has nothing."""
        self._free.extend(reversed(self._owned.pop(owner, ())))

    def owners(self) -> tuple[Hashable, ...]:
        """Everyone who owns pages, in order of reservation."""
        return tuple(self._owned)

    def check_integrity(self) -> None:
        """Every page is free or owned, and exactly once.

        Raises:
            RuntimeError: a page is lost or counted twice.
        """
        counted = [*self._free, *(page for pages in self._owned.values() for page in pages)]
        if sorted(counted) != list(range(self.num_pages)):
            num_distinct = len(set(counted))
            raise RuntimeError(f"{len(counted)} pages counted, {num_distinct} distinct, of {self.num_pages}")
