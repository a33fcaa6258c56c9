"""How a worker holds weights and computes, from what was configured."""

from model.kernels.choose import choose_kernels
from model.weights import Packing
from workers.config import ComputeConfig, WorkerGroupConfig


def make_packing(group: WorkerGroupConfig, compute: ComputeConfig) -> Packing:
    """The packing of a group's workers; sets torch's threads too."""
    device = "cuda" if group.num_gpus > 0 else "cpu"
    return Packing(
        kernels=choose_kernels(num_threads=group.num_threads, device=device, choice=compute.kernels),
        precision=compute.dtype,
        device=device,
        num_threads=group.num_threads,
    )
