"""Which matrix is held in which form: the table of model/precision.py."""

import pytest

from model.precision import PRECISIONS, Form, Precision, expert_form, head_form, matrix_form

TABLE: list[tuple[Precision, Form, Form, Form]] = [
    ("auto", "float32", "float32", "float32"),
    ("auto", "bfloat16", "bfloat16", "bfloat16"),
    ("auto", "fp8", "fp8", "fp8"),
    ("float32", "bfloat16", "float32", "float32"),
    ("float32", "fp8", "float32", "float32"),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "fp8", "bfloat16", "bfloat16"),
    ("fp8", "bfloat16", "fp8", "bfloat16"),
    ("fp8", "fp8", "fp8", "fp8"),
    ("int8", "bfloat16", "int8", "bfloat16"),
    ("int8", "float32", "int8", "bfloat16"),
    ("int8", "fp8", "int8", "fp8"),
]
"""Precision, what is stored, form of an expert, form of another matrix."""


@pytest.mark.parametrize(("precision", "stored", "expert", "other"), TABLE)
def test_forms_are_those_of_the_table(precision: Precision, stored: Form, expert: Form, other: Form) -> None:
    assert expert_form(precision, stored=stored) == expert
    assert matrix_form(precision, stored=stored) == other


@pytest.mark.parametrize("precision", PRECISIONS)
def test_head_is_held_as_other_matrices_but_in_int8(precision: Precision) -> None:
    form = head_form(precision, stored="bfloat16")
    assert form == ("int8" if precision == "int8" else matrix_form(precision, stored="bfloat16"))
