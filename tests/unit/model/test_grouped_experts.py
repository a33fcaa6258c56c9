import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels.grouped_experts import (
    Assignments,
    LocalExperts,
    expert_partial_sums,
    expert_partial_sums_reference,
)
from model.mlp import swiglu
from model.weights import ExpertWeights

NUM_EXPERTS, TOP_K, HIDDEN = 8, 4, 48


def _experts() -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(0)
    return {
        expert_idx: ExpertWeights(
            gate_FD=torch.randn(24, HIDDEN, generator=generator),
            up_FD=torch.randn(24, HIDDEN, generator=generator),
            down_DF=torch.randn(HIDDEN, 24, generator=generator),
        )
        for expert_idx in range(NUM_EXPERTS)
    }


def _choices(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, HIDDEN, generator=generator)
    ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    return x, ids, torch.rand(num_rows, TOP_K, generator=generator)


def _part(assignments: Assignments, chosen: torch.Tensor) -> Assignments:
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


@settings(max_examples=25)
@given(num_rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_sums_equal_the_reference_bit_for_bit(num_rows: int, seed: int) -> None:
    x, ids, weights = _choices(num_rows, seed)
    assignments, experts = Assignments.from_choices(ids, weights), _experts()
    got = expert_partial_sums(x, assignments, experts)
    assert got.dtype == torch.float64
    assert torch.equal(got, expert_partial_sums_reference(x, assignments, experts))


@settings(max_examples=25)
@given(num_rows=st.integers(1, 40), num_workers=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_no_partition_among_workers_changes_a_bit(num_rows: int, num_workers: int, seed: int) -> None:
    """Assignments in random order, each to a random worker that knows all experts."""
    x, ids, weights = _choices(num_rows, seed)
    whole, experts = Assignments.from_choices(ids, weights), _experts()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(whole.row_idx_A), generator=generator)
    worker_of = torch.randint(0, num_workers, (len(order),), generator=generator)
    parts = [
        expert_partial_sums(x, _part(whole, order[worker_of[order] == w]), experts)
        for w in range(num_workers)
    ]
    combined = torch.stack(parts).sum(0).float()
    assert torch.equal(combined, expert_partial_sums(x, whole, experts).float())


def test_rows_without_assignments_are_zero() -> None:
    none = Assignments.from_choices(torch.full((3, 2), -1), torch.ones(3, 2))
    assert expert_partial_sums(torch.ones(3, HIDDEN), none, _experts()).abs().sum() == 0


def test_unknown_expert_is_an_error() -> None:
    unknown = Assignments.from_choices(torch.tensor([[99]]), torch.ones(1, 1))
    with pytest.raises(KeyError, match="99"):
        expert_partial_sums(torch.ones(1, HIDDEN), unknown, _experts())


def test_local_experts_add_weighted_outputs() -> None:
    x, ids, weights = _choices(9, 5)
    experts = _experts()
    got = LocalExperts({3: experts})(3, x, ids, weights).result()
    expected = torch.stack(
        [
            sum(w * swiglu(x[t : t + 1], experts[int(e)])[0] for e, w in zip(ids[t], weights[t], strict=True))
            for t in range(9)
        ]
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)  # outputs reach 1,000
