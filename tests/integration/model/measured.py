"""What loads and conversions need of memory, each measured in a process of its own.

    python -m tests.integration.model.measured load:CHECKPOINT:PRECISION quantize:CHECKPOINT:OUT ...

Prints one {"held_bytes", "peak_bytes"} a line. Peak is the highest resident size, pages of mapped files
included, less what the process had before. The processes are forked, so that torch is imported once.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Checkpoint
from model.kernels.choose import choose_kernels
from model.quantize import quantize_checkpoint
from model.weights import Packing, load_experts, load_model_weights

NUM_THREADS = 2
NUM_SHARDS = 16


def load(path: Path, precision: Any) -> int:
    """Loads everything; bytes that are then held."""
    checkpoint = Checkpoint.open(path)
    kernels = choose_kernels(num_threads=NUM_THREADS)
    packing = Packing(kernels=kernels, precision=precision, num_threads=NUM_THREADS)
    config = checkpoint.config
    wanted = [
        (layer, expert) for layer in config.expert_layer_ids for expert in range(config.n_routed_experts)
    ]
    weights = load_model_weights(checkpoint, packing)
    return held_bytes((weights, [mlp for _, mlp in load_experts(checkpoint, packing, wanted)]))


def held_bytes(held: Any) -> int:
    """Bytes of every tensor and matrix in there."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    if hasattr(held, "num_bytes"):
        return int(held.num_bytes)
    if dataclasses.is_dataclass(held):
        return sum(held_bytes(getattr(held, field.name)) for field in dataclasses.fields(held))
    return sum(map(held_bytes, held)) if isinstance(held, tuple | list) else 0


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def measure(what: str, path: str, argument: str) -> None:
    """Does one thing and prints what it took."""
    before_bytes, held = memory_bytes("VmRSS"), 0
    if what == "load":
        held = load(Path(path), argument)
    else:
        quantize_checkpoint(Path(path), Path(argument), to="int8", num_shards=NUM_SHARDS)
    measured = {"held_bytes": held, "peak_bytes": memory_bytes("VmHWM") - before_bytes}
    sys.stdout.write(json.dumps(measured) + "\n")
    sys.stdout.flush()


def main(tasks: list[str]) -> None:
    """Measures one task after another."""
    for task in tasks:
        pid = os.fork()
        if pid == 0:
            measure(*task.split(":"))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{task} failed")


if __name__ == "__main__":
    main(sys.argv[1:])
