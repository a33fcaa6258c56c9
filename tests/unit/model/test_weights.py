"""Loading: what is read of a checkpoint, by whom, and how progress is counted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.errors import CheckpointInvalid
from model.local_experts import LocalExperts
from model.make import make_checkpoint
from model.precision import Precision
from model.weights import OnProgress, Packing, load_experts, load_model_weights
from tests.unit.model.implementations import IMPLEMENTATIONS, named_kernels
from tests.unit.model.wide_checkpoint import NUM_DENSE, NUM_SHARDS, files_of, make_wide_checkpoint

MINE = [(layer_idx, expert_idx) for layer_idx in range(NUM_DENSE, NUM_DENSE + 3) for expert_idx in (17, 201)]
"""What an expert worker holds: 2 of 256 experts of each layer, MTP layer included."""
X_RD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def wide(tmp_path: Path) -> Checkpoint:
    return make_wide_checkpoint(tmp_path / "wide")


def _packing(name: str = "torch") -> Packing:
    return Packing(kernels=named_kernels(name), num_threads=2)


def _outputs(checkpoint: Checkpoint, packing: Packing) -> list[Tensor]:
    return [mlp(X_RD) for _, mlp in load_experts(checkpoint, packing, MINE)]


def _other_shards(checkpoint: Checkpoint) -> list[Path]:
    mine = files_of(checkpoint, MINE)
    return [path for path in checkpoint.path.glob("*.safetensors") if path not in mine]


def test_experts_of_one_layer_lie_in_different_shards(wide: Checkpoint) -> None:
    assert not files_of(wide, [(NUM_DENSE, 17)]) & files_of(wide, [(NUM_DENSE, 201)])
    assert len(files_of(wide, MINE)) >= len(MINE)
    assert len(_other_shards(wide)) > NUM_SHARDS * 3 // 4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_of_256_experts_load_when_every_other_shard_is_gone(wide: Checkpoint, name: str) -> None:
    expected = _outputs(wide, _packing(name))
    for path in _other_shards(wide):
        path.unlink()
    got = _outputs(Checkpoint.open(wide.path), _packing(name))
    assert all(map(torch.equal, got, expected))
    assert len(got) == len(MINE)


def test_no_byte_of_other_shards_is_read_after_opening(wide: Checkpoint) -> None:
    expected = _outputs(wide, _packing())
    opened = Checkpoint.open(wide.path)
    for path in _other_shards(wide):
        path.write_bytes(b"")
    assert all(map(torch.equal, _outputs(opened, _packing()), expected))


def test_expert_of_a_missing_shard_is_named(wide: Checkpoint) -> None:
    for path in _other_shards(wide):
        path.unlink()
    found = Checkpoint.open(wide.path)
    with pytest.raises(CheckpointInvalid, match=rf"layers.{NUM_DENSE}.mlp.experts.100.*missing file"):
        list(load_experts(found, _packing(), [*MINE, (NUM_DENSE, 100)]))


def _experts(checkpoint: Checkpoint, packing: Packing, on_progress: OnProgress) -> None:
    places = [(layer_idx, 3) for layer_idx in checkpoint.config.expert_layer_ids]
    list(load_experts(checkpoint, packing, places, on_progress=on_progress))


def _all_experts(checkpoint: Checkpoint, packing: Packing, on_progress: OnProgress) -> None:
    LocalExperts.load(checkpoint, packing, on_progress=on_progress)


def _model(checkpoint: Checkpoint, packing: Packing, on_progress: OnProgress) -> None:
    load_model_weights(checkpoint, packing, on_progress=on_progress)


@pytest.mark.parametrize("load", [_experts, _all_experts, _model])
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_progress_rises_to_the_total(
    tmp_path: Path, load: Callable[[Checkpoint, Packing, OnProgress], None], precision: Precision
) -> None:
    make_checkpoint(tmp_path / "tiny", dtype="fp8", num_shards=3)
    seen: list[tuple[int, int]] = []
    packing = Packing(kernels=named_kernels("best"), precision=precision, num_threads=2)
    load(Checkpoint.open(tmp_path / "tiny"), packing, lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
