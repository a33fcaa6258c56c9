"""Hashes of prefixes: equal exactly where the bits of the pages are."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.prefix import PrefixRules, extend_hashes

RULES = PrefixRules(page_tokens=4, cache_form="float32", index_topk=8)


def hashes(
    token_ids: list[int], num_prompt_tokens: int | None = None, rules: PrefixRules = RULES
) -> list[bytes]:
    found: list[bytes] = []
    num_prompt_tokens = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
    extend_hashes(found, token_ids, num_prompt_tokens=num_prompt_tokens, rules=rules)
    return found


def test_docstring_example() -> None:
    of_request = hashes([1, 2, 3, 4, 5, 6, 7, 8], 5)
    of_prompt = hashes([1, 2, 3, 4, 5, 6, 7, 8])
    assert of_request[0] == of_prompt[0]
    assert of_request[1] != of_prompt[1]
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], 5) == of_request


def test_behind_index_topk_it_does_not_matter_who_wrote_a_token() -> None:
    """12 prompt tokens and 4 more of either kind: all of them read a selection."""
    assert hashes(list(range(16)), 12) == hashes(list(range(16)))


def _fate(token_ids: list[int], num_prompt_tokens: int, page_idx: int) -> list[tuple[int, bool]]:
    """All that the bits of a page depend on: every token so far and its form."""
    end = (page_idx + 1) * RULES.page_tokens
    tokens = enumerate(token_ids[:end])
    return [(token, num_prompt_tokens <= position < RULES.index_topk) for position, token in tokens]


SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=14).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
)


@given(one=SEQUENCES, other=SEQUENCES)
def test_hashes_are_equal_exactly_where_tokens_and_forms_are(
    one: tuple[list[int], int], other: tuple[list[int], int]
) -> None:
    for page_idx, (left, right) in enumerate(zip(hashes(*one), hashes(*other), strict=False)):
        assert (left == right) == (_fate(*one, page_idx) == _fate(*other, page_idx))


@given(sequence=SEQUENCES, num_before=st.integers(0, 14))
def test_hashes_grow_with_the_tokens(sequence: tuple[list[int], int], num_before: int) -> None:
    token_ids, num_prompt_tokens = sequence
    found = hashes(token_ids[:num_before], num_prompt_tokens)
    extend_hashes(found, token_ids, num_prompt_tokens=num_prompt_tokens, rules=RULES)
    assert found == hashes(token_ids, num_prompt_tokens)
    assert len(found) == len(token_ids) // 4


@pytest.mark.parametrize("other", [{"page_tokens": 2}, {"cache_form": "int8"}])
def test_other_pages_have_other_hashes(other: dict[str, object]) -> None:
    assert not set(hashes([1] * 8)) & set(hashes([1] * 8, rules=replace(RULES, **other)))
