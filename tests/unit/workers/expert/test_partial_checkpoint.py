"""An expert worker's slots, filled from a checkpoint of which only its own shards are there."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint
from model.errors import CheckpointInvalid
from model.kernels.plain import TorchKernels
from model.weights import Packing, load_experts
from tests.unit.model.wide_checkpoint import NUM_DENSE, files_of, make_wide_checkpoint
from workers.expert.slots import SlotStore
from workers.expert.types import Slot

SLOTS = [
    Slot(layer, slot, expert) for layer in (NUM_DENSE, NUM_DENSE + 1) for slot, expert in ((0, 9), (1, 250))
]


def _store(checkpoint: Checkpoint) -> SlotStore:
    packing = Packing(kernels=TorchKernels(), precision="int8", num_threads=2)
    return SlotStore(lambda places: load_experts(checkpoint, packing, places))


@pytest.fixture
def own_shards(tmp_path: Path) -> Checkpoint:
    """A checkpoint without the shards that SLOTS do not need."""
    whole = make_wide_checkpoint(tmp_path / "wide")
    kept = files_of(whole, [(slot.layer_idx, slot.expert_idx) for slot in SLOTS])
    for path in whole.path.glob("*.safetensors"):
        if path not in kept:
            path.unlink()
    return Checkpoint.open(whole.path)


def test_slots_are_filled_from_their_own_shards(own_shards: Checkpoint) -> None:
    store = _store(own_shards)
    store.prepare(SLOTS, table_version=1)
    assert set(store.experts_of(NUM_DENSE)) == {9, 250}
    assert store.num_bytes() == len(SLOTS) * (3 * 16 * 32 + (16 + 16 + 32) * 4)
    outputs = [mlp(torch.ones(1, 32)) for mlp in store.experts_of(NUM_DENSE).values()]
    assert not torch.equal(*outputs)
    store.check_integrity()


def test_slot_of_a_missing_shard_changes_nothing(own_shards: Checkpoint) -> None:
    store = _store(own_shards)
    store.prepare(SLOTS, table_version=1)
    with pytest.raises(CheckpointInvalid, match=r"mlp.experts.128.*missing file"):
        store.prepare([*SLOTS, Slot(NUM_DENSE, 2, 128)], table_version=2)
    assert (store.slots(), store.table_version) == (tuple(SLOTS), 1)
    store.check_integrity()
