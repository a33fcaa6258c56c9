"""Loading takes little more memory than what is then held; converting little more than one shard."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.byte_tokenizer import make_tokenizer
from model.quantize import quantize_checkpoint
from model.save import CheckpointContents, save_checkpoint
from model.sizes import hf_config
from tests.integration.model.measured import NUM_SHARDS

ROOT = Path(__file__).resolve().parents[3]
OVERHEAD = 1.15
"""Peak of a load, in what is then held."""
WARM_UP_BYTES = 40 << 20
"""Libraries' first use, threads, the pages of files around a tensor."""
LOADS = [
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "fp8"),
    ("bfloat16", "int8"),
    ("fp8", "auto"),
    ("fp8", "int8"),
    ("int8", "auto"),
]
"""How the checkpoint stores weights, and the precision that they are held in."""
CONFIG = {
    **hf_config("bench-1b", dtype="bfloat16"),
    "vocab_size": 4000,
    "num_hidden_layers": 3,
    "n_routed_experts": 48,
    "num_nextn_predict_layers": 0,
}
"""290 MB in BF16: two layers of 48 experts of 2.4 MB, and 60 MB beside them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights in BF16, FP8 and INT8; gone after the module, being large."""
    folder = tmp_path_factory.mktemp("large")
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02

    def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
        num_values = math.prod(shape)
        return values.repeat(-(-num_values // len(values)))[:num_values].view(shape)

    contents = CheckpointContents(hf=CONFIG, value_of=value_of, tokenizer=make_tokenizer())
    save_checkpoint(folder / "bfloat16", contents, num_shards=4)
    quantize_checkpoint(folder / "bfloat16", folder / "fp8", to="fp8")
    quantize_checkpoint(folder / "bfloat16", folder / "int8", to="int8")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, str], dict[str, int]]:
    """What each of LOADS needed, in bytes."""
    lines = _measure(*(f"load:{folder / stored}:{precision}" for stored, precision in LOADS))
    return dict(zip(LOADS, lines, strict=True))


def _measure(*tasks: str) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "tests.integration.model.measured", *tasks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("load", LOADS, ids="-".join)
def test_load_peaks_little_above_what_it_holds(
    measured: dict[tuple[str, str], dict[str, int]], load: tuple[str, str]
) -> None:
    held_bytes, peak_bytes = measured[load]["held_bytes"], measured[load]["peak_bytes"]
    assert held_bytes > 140 << 20
    assert peak_bytes <= OVERHEAD * held_bytes + WARM_UP_BYTES, (
        f"peak {peak_bytes >> 20} MiB, held {held_bytes >> 20} MiB"
    )


def test_conversion_holds_one_shard(folder: Path, tmp_path: Path) -> None:
    (measured,) = _measure(f"quantize:{folder / 'bfloat16'}:{tmp_path / 'out'}")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    shutil.rmtree(tmp_path / "out")
    assert len(sizes) == NUM_SHARDS
    assert measured["peak_bytes"] <= 2 * max(sizes) + WARM_UP_BYTES < sum(sizes)
