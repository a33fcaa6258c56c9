"""Which form of attention computes which row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.attention import SpanPlan, plan_span
from model.batch import Span


def _ends(plan: SpanPlan) -> tuple[int, int, int]:
    """Rows of each form."""
    return (
        plan.expanded_end - plan.begin_row,
        plan.dense_end - plan.expanded_end,
        plan.end_row - plan.dense_end,
    )


def test_docstring_example() -> None:
    plan = plan_span(Span(3, 10, 12, 7), 2, index_topk=8)
    assert (plan.span_idx, plan.begin_row, plan.end_row, plan.first_position) == (2, 3, 10, 5)
    assert (plan.expanded_end, plan.dense_end) == (5, 6)


@pytest.mark.parametrize(
    ("context_tokens", "prompt_tokens", "ends"),
    [
        (4, None, (4, 0, 0)),
        (4, 0, (0, 4, 0)),
        (4, 9, (4, 0, 0)),
        (8, 8, (4, 0, 0)),
        (8, 6, (2, 2, 0)),
        (8, 4, (0, 4, 0)),
        (11, None, (1, 0, 3)),
        (11, 5, (0, 1, 3)),
        (12, None, (0, 0, 4)),
        (99, 3, (0, 0, 4)),
    ],
)
def test_rows_are_expanded_dense_or_sparse(
    context_tokens: int, prompt_tokens: int | None, ends: tuple[int, int, int]
) -> None:
    """Four rows, index_topk 8."""
    plan = plan_span(Span(10, 14, context_tokens, prompt_tokens), 0, index_topk=8)
    assert _ends(plan) == ends


def _form(plan: SpanPlan, row: int) -> str:
    return "expanded" if row < plan.expanded_end else "dense" if row < plan.dense_end else "sparse"


@given(
    num_tokens=st.integers(1, 40),
    prompt_tokens=st.none() | st.integers(0, 50),
    index_topk=st.integers(1, 30),
    chunk=st.integers(1, 40),
)
def test_form_of_a_token_does_not_depend_on_chunks(
    num_tokens: int, prompt_tokens: int | None, index_topk: int, chunk: int
) -> None:
    whole = plan_span(Span(0, num_tokens, num_tokens, prompt_tokens), 0, index_topk=index_topk)
    bounds = [(begin, min(begin + chunk, num_tokens)) for begin in range(0, num_tokens, chunk)]
    plans = [plan_span(Span(0, e - b, e, prompt_tokens), 0, index_topk=index_topk) for b, e in bounds]
    in_chunks = [_form(plan, row) for plan in plans for row in range(plan.end_row)]
    assert in_chunks == [_form(whole, row) for row in range(num_tokens)]
