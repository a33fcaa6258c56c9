import torch

from model.checkpoint import Checkpoint
from model.kernels.base import Assignments
from model.local_experts import LocalExperts
from model.matrix import StoredMatrix
from model.weights import Packing
from tests.reference_data import checkpoint_dir
from tests.unit.model.implementations import named_kernels


def test_outputs_are_weighted_and_added_per_layer() -> None:
    """Experts e of layers 3 and 4 that double their gate's sign: silu(20 x) * x is 20 x * x for x >= 1."""
    kernels = named_kernels("best")
    eye, gate = torch.eye(2), StoredMatrix(values_FD=torch.eye(2) * 20)
    experts = {
        layer_idx: {
            i: kernels.pack_mlp(
                gate,
                StoredMatrix(values_FD=eye),
                StoredMatrix(values_FD=eye * layer_idx * 10**i / 20),
                "float32",
            )
            for i in range(3)
        }
        for layer_idx in (3, 4)
    }
    ids, weights = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[0.5, 0.25], [2.0, 9.0]])
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    local = LocalExperts(kernels, experts)
    got = [local(layer_idx, x, ids, weights).result() for layer_idx in (3, 4)]
    factor = torch.tensor([[0.5 + 25.0], [20.0]])
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], x * x * factor * 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], x * x * factor * 4, rtol=1e-6, atol=0)


def test_loaded_experts_are_those_of_every_layer_that_has_some() -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("mtp"))
    kernels, seen = named_kernels("best"), []
    local = LocalExperts.load(
        checkpoint, Packing(kernels=kernels), on_progress=lambda done, total: seen.append((done, total))
    )
    config = checkpoint.config
    num_experts = len(config.expert_layer_ids) * config.n_routed_experts
    assert seen == [(i + 1, num_experts) for i in range(num_experts)]
    x, none = torch.ones(1, config.hidden_size), torch.full((1, 2), -1)
    outputs = [local(layer_idx, x, none, torch.ones(1, 2)).result() for layer_idx in config.expert_layer_ids]
    assert [float(output.abs().sum()) for output in outputs] == [0.0] * len(outputs)


def test_choices_of_nobody_are_no_assignments() -> None:
    none = Assignments.from_choices(torch.full((3, 2), -1), torch.ones(3, 2))
    assert len(none.row_idx_A) == len(none.expert_idx_A) == len(none.weights_A) == 0
