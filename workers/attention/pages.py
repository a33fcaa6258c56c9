"""Accounts of KV pages: who owns which, and which full ones may be wanted again; no tensors here.

A page is a fixed number of tokens of all layers. It is free, owned by one or more sequences, or cached: full,
known by the hash of its prefix, owned by nobody, and given away when no page is free, the longest unused
first. A page with a hash is never written until it is given away. With 4 pages of 16 tokens a request of 33
tokens owns 3 pages, and a second one of 17 tokens must wait until they are released; when the two share
their first 16 tokens, the second needs one page beside the shared one and fits.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence


class PageAllocator:
    """Hands out page indices; the engine thread is its only user."""

    def __init__(self, num_pages: int, *, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_evictions = 0
        """Cached pages that were given away so far."""
        self.on_eviction: Callable[[int, bytes], None] | None = None
        """Is told of a cached page and its hash before it is given away."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[Hashable, list[int]] = {}
        self._num_owners = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Pages with a hash and without an owner, the longest unused first; a page stands before the one that
        its prefix ends in, so that what is given away first has nothing hanging on it."""

    @property
    def num_free(self) -> int:
        """Pages that nobody owns and nobody may want again."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody owns, kept for the next sequence with their prefix."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be had: free and cached."""
        return len(self._free) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def can_reserve(self, num_tokens: int) -> bool:
        """Whether `reserve` would succeed without a prefix to share."""
        return self.pages_for(num_tokens) <= self.num_available

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many leading hashes have a page here."""
        return next((i for i, digest in enumerate(hashes) if digest not in self._page_of), len(hashes))

    def find(self, digest: bytes) -> int | None:
        """The page of a hash, which must not be written; None = it is not here."""
        return self._page_of.get(digest)

    def reserve(self, owner: Hashable, *, num_tokens: int, prefix: Sequence[bytes] = ()) -> tuple[int, ...]:
        """Page indices for `num_tokens` tokens, in token order.

        Args:
            owner: who gets them.
            num_tokens: tokens in all.
            prefix: hashes of its first pages; the first `count_prefix(prefix)` pages are shared, full, and
            must
                not be written.

        Raises:
            RuntimeError: too few pages, or the owner has some already: the caller did not look.
        """
        shared = [self._page_of[digest] for digest in prefix[: self.count_prefix(prefix)]]
        num_new = self.pages_for(num_tokens) - len(shared)
        num_wanted = num_new + sum(page in self._cached for page in shared)
        if num_wanted > self.num_available or owner in self._owned:
            raise RuntimeError(f"{owner} wants {num_wanted} pages; {self.num_available} are to be had")
        for page in shared:
            self._pin(page)
        self._owned[owner] = [*shared, *(self._take() for _ in range(num_new))]
        return tuple(self._owned[owner])

    def extend(self, owner: Hashable, *, num_pages: int) -> tuple[int, ...]:
        """Gives an owner more pages; all that it has then.

        Raises:
            RuntimeError: too few pages: the caller did not look.
        """
        if num_pages > self.num_available:
            message = f"{owner} wants {num_pages} more pages; {self.num_available} are to be had"
            raise RuntimeError(message)
        self._owned[owner].extend(self._take() for _ in range(num_pages))
        return self.pages_of(owner)

    def adopt(self, owner: Hashable, *, page_idx: int, digest: bytes) -> bool:
        """Whether there is a page of this hash; the owner has it then in place of its own `page_idx`-th."""
        page = self._page_of.get(digest)
        if page is None:
            return False
        own = self._owned[owner]
        if own[page_idx] != page:
            self._pin(page)
            self._unpin(own[page_idx])
            own[page_idx] = page
        return True

    def publish(self, owner: Hashable, *, page_idx: int, digest: bytes) -> None:
        """The owner's `page_idx`-th page is full and has this hash; a page that has it already is taken.

        The pages before it are published, so that nobody's page hangs on one that is gone.
        """
        if not self.adopt(owner, page_idx=page_idx, digest=digest):
            page = self._owned[owner][page_idx]
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def pages_of(self, owner: Hashable) -> tuple[int, ...]:
        """An owner's pages in token order."""
        return tuple(self._owned[owner])

    def release(self, owner: Hashable) -> None:
        """Frees what an owner has, the full pages for those who come with the same prefix."""
        for page in reversed(self._owned.pop(owner, [])):
            self._unpin(page)

    def owners(self) -> tuple[Hashable, ...]:
        """Everyone who owns pages, in order of reservation."""
        return tuple(self._owned)

    def check_integrity(self) -> None:
        """Every page is either free, cached or owned, as often as is counted, and hashes lead to their pages.

        Raises:
            RuntimeError: a page is lost or counted twice, or a hash leads nowhere.
        """
        num_owners = Counter(page for pages in self._owned.values() for page in pages)
        counted = [*self._free, *self._cached, *num_owners]
        if sorted(counted) != list(range(self.num_pages)):
            num_distinct = len(set(counted))
            raise RuntimeError(f"{len(counted)} pages counted, {num_distinct} distinct, of {self.num_pages}")
        if any(self._num_owners[page] != num_owners[page] for page in range(self.num_pages)):
            raise RuntimeError(f"pages are owned {dict(num_owners)} times, counted {self._num_owners}")
        if {page: digest for digest, page in self._page_of.items()} != self._hash_of:
            raise RuntimeError(
                f"{len(self._page_of)} hashes lead to pages, {len(self._hash_of)} pages have one"
            )
        if any(page in self._hash_of for page in self._free) or any(
            page not in self._hash_of
            for page in (*self._cached, *(p for p, n in num_owners.items() if n > 1))
        ):
            raise RuntimeError("a free page has a hash, or a cached or shared one has none")

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            digest = self._hash_of.pop(page)
            del self._page_of[digest]
            if self.on_eviction is not None:
                self.on_eviction(page, digest)
            self.num_evictions += 1
        self._num_owners[page] = 1
        return page

    def _pin(self, page: int) -> None:
        self._cached.pop(page, None)
        self._num_owners[page] += 1

    def _unpin(self, page: int) -> None:
        self._num_owners[page] -= 1
        if self._num_owners[page] == 0:
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)
