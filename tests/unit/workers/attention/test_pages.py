"""Page accounts: a state machine against a plain model, and what is refused."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.attention.pages import PageAllocator


class PageMachine(RuleBasedStateMachine):
    """Reserves and releases at random beside a dict of sets."""

    @initialize(num_pages=st.integers(1, 12), page_tokens=st.integers(1, 5))
    def build(self, num_pages: int, page_tokens: int) -> None:
        self.pages = PageAllocator(num_pages, page_tokens=page_tokens)
        self.owned: dict[int, tuple[int, ...]] = {}
        self.next_owner = 0

    def _num_used(self) -> int:
        return sum(len(pages) for pages in self.owned.values())

    @rule(num_tokens=st.integers(1, 30))
    def reserve(self, num_tokens: int) -> None:
        owner, self.next_owner = self.next_owner, self.next_owner + 1
        num_wanted = sum(1 for token in range(num_tokens) if token % self.pages.page_tokens == 0)
        fits = num_wanted <= self.pages.num_pages - self._num_used()
        assert self.pages.can_reserve(num_tokens) == fits
        if not fits:
            with pytest.raises(RuntimeError, match=f"{owner} wants {num_wanted} pages"):
                self.pages.reserve(owner, num_tokens=num_tokens)
            return
        got = self.pages.reserve(owner, num_tokens=num_tokens)
        assert len(set(got)) == num_wanted == len(got)
        assert not set(got) & {page for pages in self.owned.values() for page in pages}
        self.owned[owner] = got

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        self.pages.release(owner)
        del self.owned[owner]

    @rule()
    def release_of_a_stranger_changes_nothing(self) -> None:
        self.pages.release("nobody")

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def second_reservation_is_refused(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        with pytest.raises(RuntimeError):
            self.pages.reserve(owner, num_tokens=1)

    @invariant()
    def accounts_are_right(self) -> None:
        if hasattr(self, "pages"):
            self.pages.check_integrity()
            assert self.pages.num_free == self.pages.num_pages - self._num_used()
            assert self.pages.owners() == tuple(self.owned)


PageMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPages = PageMachine.TestCase


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
    with pytest.raises(RuntimeError, match="wants 3 pages; 2 are free"):
        pages.reserve("big", num_tokens=9)
    assert (pages.num_free, pages.owners()) == (2, ())


@pytest.mark.parametrize(
    ("owned", "what"),
    [((0, 0), "4 pages counted, 3 distinct, of 3"), ((), "2 pages counted, 2 distinct, of 3")],
)
def test_lost_and_shared_pages_are_noticed(owned: tuple[int, ...], what: str) -> None:
    pages = PageAllocator(3, page_tokens=4)
    pages.reserve("a", num_tokens=4)
    pages._owned["a"] = owned
    with pytest.raises(RuntimeError, match=what):
        pages.check_integrity()
