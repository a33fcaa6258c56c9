"""How a worker holds its weights, from its group's config and the cluster's."""

from collections.abc import Iterator

import pytest
import torch

from model.kernels.choose import KernelChoice
from tests.unit.model.implementations import named_kernels
from workers.config import ComputeConfig, WorkerGroupConfig
from workers.packing import make_packing


@pytest.fixture(autouse=True)
def threads_put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_packing_is_what_was_configured() -> None:
    packing = make_packing(WorkerGroupConfig(num_threads=2), ComputeConfig(dtype="int8", kernels="torch"))
    assert (packing.precision, packing.device, packing.num_threads) == ("int8", "cpu", 2)
    assert packing.kernels.name == "torch"
    assert torch.get_num_threads() == 2


def test_native_kernels_leave_torch_one_thread() -> None:
    best = named_kernels("best")
    packing = make_packing(WorkerGroupConfig(num_threads=2), ComputeConfig())
    assert packing.kernels.name == best.name
    assert torch.get_num_threads() == (2 if best.name == "torch" else 1)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_worker_with_a_gpu_computes_there_by_torch(choice: KernelChoice) -> None:
    packing = make_packing(WorkerGroupConfig(num_gpus=0.5), ComputeConfig(kernels=choice))
    assert packing.device == "cuda"
    assert packing.kernels.name == "torch"
