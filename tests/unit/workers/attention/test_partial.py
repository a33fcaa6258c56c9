"""What can be copied of a page that leaves a text in its middle: equal tokens in equal forms, and no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.prefix import PrefixRules
from workers.attention.partial import PartialIndex, Texts

RULES = PrefixRules(page_tokens=4, cache_form="float32", index_topk=10)
PAGES = st.builds(
    Texts,
    token_ids=st.lists(st.integers(0, 1), min_size=4, max_size=4).map(tuple),
    first_position=st.just(8),
    num_prompt_tokens=st.integers(5, 14),
)


def page(*token_ids: int, num_prompt_tokens: int = 99, first_position: int = 0) -> Texts:
    return Texts(token_ids=token_ids, first_position=first_position, num_prompt_tokens=num_prompt_tokens)


def _num_equal(one: Texts, other: Texts) -> int:
    """Row by row: the token and whether it has the generated tokens' form."""
    rows = []
    for texts in (one, other):
        positions = range(texts.first_position, texts.first_position + len(texts.token_ids))
        forms = [texts.num_prompt_tokens <= p < RULES.index_topk for p in positions]
        rows.append(list(zip(texts.token_ids, forms, strict=True)))
    pairs = zip(*rows, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(map(len, rows)))


@given(wanted=PAGES, num_wanted=st.integers(0, 4), others=st.lists(PAGES, max_size=6))
def test_longest_beginning_is_found(wanted: Texts, num_wanted: int, others: list[Texts]) -> None:
    wanted = Texts(
        token_ids=wanted.token_ids[:num_wanted],
        first_position=wanted.first_position,
        num_prompt_tokens=wanted.num_prompt_tokens,
    )
    index = PartialIndex(RULES)
    for i, other in enumerate(others):
        index.add(b"parent", bytes([i]), other)
    found = index.find(b"parent", wanted)
    longest = max((_num_equal(wanted, other) for other in others), default=0)
    assert (found[1] if found else 0) == longest
    if found:
        assert _num_equal(wanted, others[found[0][0]]) == longest


def test_pages_behind_other_prefixes_are_not_found() -> None:
    index = PartialIndex(RULES)
    index.add(b"x", b"1", page(1, 2, 3, 4))
    assert index.find(b"y", page(1, 2)) is None
    assert index.find(b"x", page(2, 2)) is None
    assert index.find(b"x", page(1, 2)) == (b"1", 2)


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    index = PartialIndex(RULES)
    index.add(b"x", b"1", page(1, 2, 3, 4))
    index.add(b"x", b"1", page(1, 2, 3, 4))
    index.forget(b"1")
    index.forget(b"1")
    assert index.find(b"x", page(1, 2)) is None
    assert not index._children
    assert not index._parent_of


def test_newest_pages_behind_a_prefix_are_remembered() -> None:
    index = PartialIndex(RULES)
    for i in range(40):
        index.add(b"x", bytes([i]), page(i, 2, 3, 4))
    assert index.find(b"x", page(7)) is None
    assert index.find(b"x", page(8)) == (bytes([8]), 1)


@pytest.mark.parametrize(("position", "num_equal"), [(4, 0), (8, 0), (12, 4)])
def test_answer_that_became_a_prompt_is_copied_only_where_all_read_a_selection(
    position: int, num_equal: int
) -> None:
    index = PartialIndex(RULES)
    index.add(b"x", b"1", page(1, 2, 3, 4, num_prompt_tokens=2, first_position=position))
    found = index.find(b"x", page(1, 2, 3, 4, first_position=position))
    assert (found[1] if found else 0) == num_equal
