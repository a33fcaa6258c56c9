"""Opening a checkpoint in a worker: what is wrong with it is told as ModelBroken, by name."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.reference_data import checkpoint_dir
from wire.errors import ModelBroken
from workers.checkpoint import open_checkpoint

TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_dir("default"), tmp_path / "model"))


def test_good_checkpoint_opens(folder: Path) -> None:
    assert open_checkpoint(folder).config.vocab_size == 320


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_wrong_config_names_the_field(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["kv_lora_rank"] = "many"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelBroken, match="kv_lora_rank"):
        open_checkpoint(folder)


@pytest.mark.parametrize("is_missing", [True, False])
def test_wrong_tensor_is_named(folder: Path, is_missing: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    wrong = tensors.pop(TENSOR)[:-1].contiguous()
    save_file(tensors if is_missing else {**tensors, TENSOR: wrong}, folder / "model.safetensors")
    with pytest.raises(ModelBroken, match=TENSOR.replace(".", r"\.")):
        open_checkpoint(folder)
