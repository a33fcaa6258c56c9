"""Sums over routed experts: what they are, and that no order of their terms shows."""

import functools
from collections.abc import Mapping
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels.base import Assignments, Kernels
from model.kernels.plain import TorchKernels
from model.matrix import Mlp, StoredMatrix
from model.precision import Form
from tests.unit.model.kernels.cases import assert_near, held, random, stored_matrix

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 4, 50, 33
"""Neither width fills a panel."""
FORMS = get_args(Form)
INT8_TOLERANCE = 5e-3
"""As in test_matrices.py: one inner value a code off."""


def _parts(expert_idx: int) -> tuple[StoredMatrix, StoredMatrix, StoredMatrix]:
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    gate, up, down = (stored_matrix(*shape, seed=3 * expert_idx + i) for i, shape in enumerate(shapes))
    return gate, up, down


@functools.cache
def _experts(kernels: Kernels, form: Form) -> Mapping[int, Mlp]:
    return {i: kernels.pack_mlp(*_parts(i), form) for i in range(NUM_EXPERTS)}


def _choices(num_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each, and their weights; some rows choose fewer than TOP_K."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    ids[torch.rand(num_rows, TOP_K, generator=generator) < 0.1] = -1
    return random(num_rows, HIDDEN, seed=seed), ids, torch.rand(num_rows, TOP_K, generator=generator)


def _part(assignments: Assignments, chosen: Tensor) -> Assignments:
    return Assignments(
        row_idx_A=assignments.row_idx_A[chosen],
        expert_idx_A=assignments.expert_idx_A[chosen],
        weights_A=assignments.weights_A[chosen],
    )


def test_docstring_example_of_choices() -> None:
    ids = torch.tensor([[4, 7], [7, -1]], dtype=torch.int32)
    got = Assignments.from_choices(ids, torch.tensor([[0.1, 0.2], [0.3, 0.0]]))
    assert (got.row_idx_A.tolist(), got.expert_idx_A.tolist()) == ([0, 0, 1], [4, 7, 7])
    assert got.weights_A.tolist() == pytest.approx([0.1, 0.2, 0.3])


def _expected_sums(x: Tensor, assignments: Assignments, form: Form) -> Tensor:
    """The sums in float64."""
    sums = torch.zeros_like(x, dtype=torch.float64)
    choices = zip(assignments.row_idx_A, assignments.expert_idx_A, assignments.weights_A, strict=True)
    for row_idx, expert_idx, weight in choices:
        gate, up, down = (held(part, form) for part in _parts(int(expert_idx)))
        row = x[row_idx].double()
        sums[row_idx] += down @ (torch.nn.functional.silu(gate @ row) * (up @ row)) * weight.double()
    return sums


@pytest.mark.parametrize("num_rows", [1, 2, 13])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_sums_are_weighted_outputs_of_experts(kernels: Kernels, form: Form, num_rows: int) -> None:
    x, ids, weights = _choices(num_rows, seed=1)
    assignments = Assignments.from_choices(ids, weights)
    got = kernels.expert_sums(x, assignments, _experts(kernels, form))
    assert got.dtype == torch.float64
    assert_near(got.float(), _expected_sums(x, assignments, form))


def test_int8_sums_are_near_those_of_torch(kernels: Kernels) -> None:
    x, ids, weights = _choices(40, seed=2)
    assignments = Assignments.from_choices(ids, weights)
    got, expected = (
        k.expert_sums(x, assignments, _experts(k, "int8")).float() for k in (kernels, TorchKernels())
    )
    assert_near(got, expected, tolerance=INT8_TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10)
@given(num_rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_sums_equal_one_assignment_at_a_time_bit_for_bit(
    native: Kernels, form: Form, num_rows: int, seed: int
) -> None:
    x, ids, weights = _choices(num_rows, seed)
    assignments, experts = Assignments.from_choices(ids, weights), _experts(native, form)
    expected = torch.zeros_like(x, dtype=torch.float64)
    choices = zip(assignments.row_idx_A, assignments.expert_idx_A, assignments.weights_A, strict=True)
    for row_idx, expert_idx, weight in choices:
        expected[row_idx] += (experts[int(expert_idx)](x[row_idx][None])[0] * weight).double()
    assert torch.equal(native.expert_sums(x, assignments, experts).float(), expected.float())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10)
@given(num_rows=st.integers(1, 40), num_workers=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_no_partition_among_workers_changes_a_bit(
    native: Kernels, form: Form, num_rows: int, num_workers: int, seed: int
) -> None:
    """Assignments in random order, each to a random worker that knows all experts."""
    x, ids, weights = _choices(num_rows, seed)
    whole, experts = Assignments.from_choices(ids, weights), _experts(native, form)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(whole.row_idx_A), generator=generator)
    worker_of = torch.randint(0, num_workers, (len(order),), generator=generator)
    parts = [native.expert_sums(x, _part(whole, order[worker_of == w]), experts) for w in range(num_workers)]
    combined = torch.stack(parts).sum(0).float()
    assert torch.equal(combined, native.expert_sums(x, whole, experts).float())


def test_a_row_may_go_to_one_expert_twice(kernels: Kernels) -> None:
    x, experts = random(3, HIDDEN, seed=3), _experts(kernels, "float32")
    twice = Assignments.from_choices(torch.tensor([[5, 5]] * 3), torch.tensor([[0.5, 0.25]] * 3))
    once = Assignments.from_choices(torch.tensor([[5]] * 3), torch.tensor([[0.75]] * 3))
    got = kernels.expert_sums(x, twice, experts).float()
    assert_near(got, kernels.expert_sums(x, once, experts))


def test_rows_without_assignments_are_zero(kernels: Kernels) -> None:
    one = Assignments.from_choices(torch.tensor([[-1, -1], [3, -1], [-1, -1]]), torch.ones(3, 2))
    got = kernels.expert_sums(torch.ones(3, HIDDEN), one, _experts(kernels, "float32"))
    assert got[[0, 2]].abs().max() == 0
    assert got[1].abs().max() > 0


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_assignments_give_zeros(kernels: Kernels, num_rows: int) -> None:
    none = Assignments.from_choices(torch.full((num_rows, 2), -1), torch.ones(num_rows, 2))
    got = kernels.expert_sums(torch.ones(num_rows, HIDDEN), none, _experts(kernels, "float32"))
    assert torch.equal(got, torch.zeros(num_rows, HIDDEN, dtype=torch.float64))


def test_unknown_expert_is_an_error(kernels: Kernels) -> None:
    unknown = Assignments.from_choices(torch.tensor([[99]]), torch.ones(1, 1))
    with pytest.raises(KeyError, match="99"):
        kernels.expert_sums(torch.ones(1, HIDDEN), unknown, _experts(kernels, "float32"))


@pytest.mark.parametrize("form", FORMS)
def test_gathered_experts_are_the_same_and_give_the_same_bits(kernels: Kernels, form: Form) -> None:
    x, ids, weights = _choices(13, seed=5)
    assignments, experts = Assignments.from_choices(ids, weights), _experts(kernels, form)
    gathered = kernels.gather_experts(experts)
    assert dict(gathered) == dict(experts)
    assert torch.equal(
        kernels.expert_sums(x, assignments, gathered), kernels.expert_sums(x, assignments, experts)
    )


@pytest.mark.parametrize("expert_idx", [-1, NUM_EXPERTS, 2**31 - 1])
def test_gathered_experts_know_who_is_not_among_them(native: Kernels, expert_idx: int) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    unknown = Assignments(row_idx_A=one, expert_idx_A=one + expert_idx, weights_A=torch.ones(1))
    gathered = native.gather_experts(_experts(native, "float32"))
    with pytest.raises(KeyError, match=str(expert_idx)):
        native.expert_sums(torch.ones(1, HIDDEN), unknown, gathered)


@pytest.mark.parametrize("row_idx", [-1, 2])
def test_row_that_is_not_there_is_an_error(native: Kernels, row_idx: int) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    wrong = Assignments(row_idx_A=one + row_idx, expert_idx_A=one, weights_A=torch.ones(1))
    with pytest.raises(IndexError, match=f"row {row_idx} of 2"):
        native.expert_sums(torch.ones(2, HIDDEN), wrong, _experts(native, "float32"))


def test_experts_of_two_forms_are_not_one_layers(native: Kernels) -> None:
    mixed = {0: _experts(native, "float32")[0], 1: _experts(native, "int8")[1]}
    with pytest.raises(ValueError, match=r"experts \[0, 1\] are held in several forms"):
        native.gather_experts(mixed)


def test_transposed_rows_are_taken(kernels: Kernels) -> None:
    x, ids, weights = _choices(30, seed=4)
    assignments = Assignments.from_choices(ids, weights)
    got = kernels.expert_sums(x.t().contiguous().t(), assignments, _experts(kernels, "float32")).float()
    assert_near(got, _expected_sums(x, assignments, "float32"))
