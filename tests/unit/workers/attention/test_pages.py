"""Page accounts: a state machine against a plain model, and what is refused."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.attention.pages import PageAllocator


class PageMachine(RuleBasedStateMachine):
    """Owners with texts of two letters beside a plain model: which pages hold which prefix, and who has them.

    A page's "hash" is its whole prefix, so the machine can tell what a page should hold. Every page handed
    out is written at once where it is the owner's own, and what is shared must hold what its hash says.
    """

    @initialize(num_pages=st.integers(1, 12), page_tokens=st.integers(1, 3))
    def build(self, num_pages: int, page_tokens: int) -> None:
        self.pages = PageAllocator(num_pages, page_tokens=page_tokens)
        self.texts: dict[int, bytes] = {}
        self.num_published: dict[int, int] = {}
        self.written: dict[int, bytes] = {}
        """Page -> the prefix that its rows were computed for."""
        self.next_owner = 0

    def _prefixes(self, text: bytes) -> list[bytes]:
        length = self.pages.page_tokens
        return [text[:end] for end in range(length, len(text) + 1, length)]

    def _num_pinned(self) -> int:
        return len({page for owner in self.texts for page in self.pages.pages_of(owner)})

    @rule(text=st.text("ab", min_size=1, max_size=14), shares=st.booleans())
    def reserve(self, text: str, shares: bool) -> None:
        owner, self.next_owner = self.next_owner, self.next_owner + 1
        prefix = self._prefixes(text.encode()) if shares else []
        num_shared = self.pages.count_prefix(prefix)
        num_pages = self.pages.pages_for(len(text))
        pinned = {page for other in self.texts for page in self.pages.pages_of(other)}
        num_wanted = num_pages - sum(
            any(self.written[page] == digest for page in pinned) for digest in prefix[:num_shared]
        )
        if num_wanted > self.pages.num_pages - len(pinned):
            with pytest.raises(RuntimeError, match=f"{owner} wants"):
                self.pages.reserve(owner, num_tokens=len(text), prefix=prefix)
            return
        got = self.pages.reserve(owner, num_tokens=len(text), prefix=prefix)
        assert len(set(got)) == num_pages == len(got)
        assert not pinned & set(got[num_shared:])
        assert [self.written[page] for page in got[:num_shared]] == prefix[:num_shared]
        for page in got[num_shared:]:
            self.written[page] = b""
        self.texts[owner], self.num_published[owner] = text.encode(), num_shared

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), adopts=st.booleans())
    def compute_a_page(self, data: st.DataObject, adopts: bool) -> None:
        """The next full page is computed, or taken from another that has computed it."""
        owner = data.draw(st.sampled_from(sorted(self.texts)))
        page_idx, prefixes = self.num_published[owner], self._prefixes(self.texts[owner])
        if page_idx == len(prefixes):
            return
        digest = prefixes[page_idx]
        if not (adopts and self.pages.adopt(owner, page_idx=page_idx, digest=digest)):
            self.written[self.pages.pages_of(owner)[page_idx]] = digest
            self.pages.publish(owner, page_idx=page_idx, digest=digest)
        assert self.pages.count_prefix(prefixes) > page_idx
        self.num_published[owner] += 1

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.texts)))
        self.pages.release(owner)
        del self.texts[owner]

    @rule()
    def release_of_a_stranger_changes_nothing(self) -> None:
        self.pages.release("nobody")

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def second_reservation_is_refused(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.texts)))
        with pytest.raises(RuntimeError):
            self.pages.reserve(owner, num_tokens=1)

    @invariant()
    def accounts_are_right(self) -> None:
        if hasattr(self, "pages"):
            self.pages.check_integrity()
            assert self.pages.num_available == self.pages.num_pages - self._num_pinned()
            assert self.pages.owners() == tuple(self.texts)

    @invariant()
    def what_is_published_is_there_and_nobody_wrote_into_it(self) -> None:
        for owner, text in getattr(self, "texts", {}).items():
            num_published = self.num_published[owner]
            held = [self.written[page] for page in self.pages.pages_of(owner)[:num_published]]
            assert held == self._prefixes(text)[:num_published]

    @invariant()
    def every_cached_page_can_be_found(self) -> None:
        """Nothing hangs on a page that was given away: its prefixes are all here."""
        for digest in getattr(self, "pages", PageAllocator(1, page_tokens=1))._page_of:
            prefixes = self._prefixes(digest)
            assert self.pages.count_prefix(prefixes) == len(prefixes)


PageMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPages = PageMachine.TestCase


def filled(pages: PageAllocator, owner: str, text: bytes) -> None:
    """An owner came, computed its text and left."""
    prefixes = [text[: i + 1] for i in range(len(text))]
    pages.reserve(owner, num_tokens=len(text), prefix=prefixes)
    for page_idx, digest in enumerate(prefixes):
        pages.publish(owner, page_idx=page_idx, digest=digest)
    pages.release(owner)


def test_second_with_the_same_prefix_needs_one_page_beside_it() -> None:
    """The docstring's: 4 pages of 16 tokens, 33 tokens own 3, 17 tokens with the same first page one more."""
    pages = PageAllocator(4, page_tokens=16)
    first = pages.reserve("first", num_tokens=33)
    pages.publish("first", page_idx=0, digest=b"x")
    second = pages.reserve("second", num_tokens=17, prefix=[b"x"])
    assert (second[0], len(set(first + second))) == (first[0], 4)
    pages.release("first")
    assert (pages.num_free, pages.num_cached) == (2, 0)
    pages.release("second")
    assert (pages.num_free, pages.num_cached) == (3, 1)


def test_longest_unused_page_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pages = PageAllocator(5, page_tokens=1)
    filled(pages, "old", b"abc")
    filled(pages, "new", b"xy")
    filled(pages, "again", b"a")
    left = []
    for num_taken in range(1, 6):
        pages.reserve("taker", num_tokens=num_taken)
        left.append([pages.count_prefix([b"a", b"ab", b"abc"]), pages.count_prefix([b"x", b"xy"])])
        pages.release("taker")
        # What was taken came back free and would be taken again: each round takes one more.
    assert left == [[2, 2], [1, 2], [1, 1], [1, 0], [0, 0]]
    assert pages.num_evictions == 5


def test_page_of_a_hash_is_found_until_it_is_given_away() -> None:
    pages = PageAllocator(2, page_tokens=1)
    filled(pages, "owner", b"a")
    assert pages.find(b"a") is not None
    pages.reserve("taker", num_tokens=2)
    assert pages.find(b"a") is None


def test_two_who_computed_the_same_page_end_up_with_one() -> None:
    pages = PageAllocator(2, page_tokens=1)
    one, other = pages.reserve("one", num_tokens=1), pages.reserve("other", num_tokens=1)
    assert one != other
    pages.publish("one", page_idx=0, digest=b"a")
    pages.publish("other", page_idx=0, digest=b"a")
    assert pages.pages_of("other") == one
    assert (pages.num_free, pages.num_available) == (1, 1)


@pytest.mark.parametrize(
    ("breaks", "what"),
    [
        (lambda pages: pages._hash_of.clear(), "1 hashes lead to pages, 0 pages have one"),
        (lambda pages: pages._cached.clear(), "1 pages counted, 1 distinct, of 2"),
        (lambda pages: pages._free.append(pages._cached.popitem()[0]), "a free page has a hash"),
        (lambda pages: pages._cached.update({pages._free.pop(): None}), "a cached or shared one has none"),
    ],
)
def test_broken_cache_is_noticed(breaks: Callable[[PageAllocator], object], what: str) -> None:
    pages = PageAllocator(2, page_tokens=1)
    filled(pages, "one", b"a")
    pages.check_integrity()
    breaks(pages)
    with pytest.raises(RuntimeError, match=what):
        pages.check_integrity()


def test_docstring_example() -> None:
    """4 pages of 16 tokens: 33 tokens own 3; 17 tokens wait until they are released."""
    pages = PageAllocator(4, page_tokens=16)
    assert len(pages.reserve("first", num_tokens=33)) == 3
    assert not pages.can_reserve(17)
    pages.release("first")
    assert len(pages.reserve("second", num_tokens=17)) == 2


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_are_rounded_up(num_tokens: int, num_pages: int) -> None:
    assert PageAllocator(9, page_tokens=4).pages_for(num_tokens) == num_pages


def test_refused_reservation_changes_nothing() -> None:
    pages = PageAllocator(2, page_tokens=4)
    with pytest.raises(RuntimeError, match="wants 3 pages; 2 are to be had"):
        pages.reserve("big", num_tokens=9)
    assert (pages.num_free, pages.owners()) == (2, ())


@pytest.mark.parametrize(
    ("owned", "what"),
    [([0, 0], "owned {0: 2} times, counted"), ([], "2 pages counted, 2 distinct, of 3")],
)
def test_lost_and_shared_pages_are_noticed(owned: list[int], what: str) -> None:
    pages = PageAllocator(3, page_tokens=4)
    pages.reserve("a", num_tokens=4)
    pages._owned["a"] = owned
    with pytest.raises(RuntimeError, match=what):
        pages.check_integrity()
