import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer

from model.byte_tokenizer import NUM_TOKENS
from model.checkpoint import INDEX_FILE, Checkpoint, expected_tensors
from model.config import ModelConfig
from model.errors import CheckpointInvalid
from model.make import make_checkpoint
from model.sizes import SIZES, DtypeName, SizeName, hf_config
from model.summary import summarise
from tests.unit.model.harness import greedy, load_model, run_prompt

PROMPT = [75, 104, 111, 111, 114]


def _bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", seed=3)
    make_checkpoint(tmp_path / "b", seed=3)
    make_checkpoint(tmp_path / "c", seed=4)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    assert _bytes(tmp_path / "a") != _bytes(tmp_path / "c")


def test_shards_hold_the_same_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "five", num_shards=5)
    one, five = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "five")
    five.check()
    assert len(list((tmp_path / "five").glob("*.safetensors"))) == 5
    assert (tmp_path / "five" / INDEX_FILE).exists()
    for name, shape in list(expected_tensors(one.config).items())[::40]:
        assert torch.equal(one.read(name, shape=shape), five.read(name, shape=shape))


@pytest.mark.parametrize("dtype", get_args(DtypeName))
def test_every_dtype_computes_healthy_logits(tmp_path: Path, dtype: DtypeName) -> None:
    make_checkpoint(tmp_path / dtype, dtype=dtype)
    Checkpoint.open(tmp_path / dtype).check()
    logits = run_prompt(load_model(tmp_path / dtype), PROMPT).logits
    assert 0.8 < logits.std() < 2.5
    assert logits.isfinite().all()


def test_stored_types_are_those_of_a_published_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "fp8", dtype="fp8")
    checkpoint = Checkpoint.open(tmp_path / "fp8")
    dtype = {name.removeprefix("model.layers.1."): checkpoint.dtype(name) for name in checkpoint.names()}
    assert dtype["mlp.experts.0.down_proj.weight"] == "F8_E4M3"
    assert dtype["mlp.experts.0.down_proj.weight_scale_inv"] == "F32"
    assert dtype["self_attn.indexer.wk.weight"] == "F8_E4M3"
    assert dtype["self_attn.indexer.weights_proj.weight"] == "BF16"
    assert dtype["self_attn.indexer.k_norm.bias"] == "F32"
    assert dtype["mlp.gate.weight"] == "BF16"
    assert dtype["mlp.gate.e_score_correction_bias"] == "F32"
    assert dtype["model.embed_tokens.weight"] == "BF16"


def test_greedy_text_of_tiny_is_printable_and_varied(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny")
    ids = greedy(load_model(tmp_path / "tiny"), PROMPT, num_tokens=48)
    text = Tokenizer.from_file(str(tmp_path / "tiny" / "tokenizer.json")).decode(ids)
    assert text.isascii()
    assert text.isprintable()
    assert len(set(ids)) > 10


def test_tiny_has_every_feature_and_stays_small(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny")
    config = Checkpoint.open(tmp_path / "tiny").config
    assert (config.first_k_dense_replace, config.num_nextn_predict_layers) == (1, 1)
    assert (config.n_routed_experts, config.n_group, config.index_topk) == (32, 8, 64)
    assert config.rope_scaling is not None
    assert config.max_position_embeddings >= 2048
    assert sum(len(data) for data in _bytes(tmp_path / "tiny").values()) < 5_000_000


@pytest.mark.parametrize("dtype", get_args(DtypeName))
@pytest.mark.parametrize("size", get_args(SizeName))
def test_every_size_is_a_config_that_loads(size: SizeName, dtype: DtypeName) -> None:
    config = ModelConfig.from_hf(json.loads(json.dumps(hf_config(size, dtype=dtype))))
    assert config.vocab_size >= NUM_TOKENS
    assert set(SIZES) == set(get_args(SizeName))


def test_cut_off_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "out", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(CheckpointInvalid, match="exists already"):
        make_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_empty_directory_is_filled(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    Checkpoint.open(tmp_path).check()


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_checkpoint(tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(seen), len(seen))


@pytest.mark.parametrize("dtype", get_args(DtypeName))
def test_summary_counts_what_the_files_hold(tmp_path: Path, dtype: DtypeName) -> None:
    make_checkpoint(tmp_path / "out", dtype=dtype, num_shards=3)
    checkpoint = Checkpoint.open(tmp_path / "out")
    summary = summarise(checkpoint)
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    header_bytes = stored - sum(summary.dtype_bytes.values())
    assert 0 < header_bytes < 200 * len(checkpoint.names())
    assert summary.num_files == 3
    assert summary.expert_bytes == 3 * 128 * 32 * 4
    assert summary.all_experts_bytes == 3 * 32 * summary.expert_bytes
    assert summary.kv_bytes_per_token == 4 * (64 + 16 + 32) * 4
    assert summary.kv_bytes_by_form == {
        "float32": summary.kv_bytes_per_token,
        "bfloat16": 4 * ((64 + 16) * 2 + 32 * 4),
        "fp8": 4 * (64 + 4 + 4 + 16 * 2 + 32 * 4),
    }
    routed_active = 2 * 4 * summary.expert_bytes // 4
    assert (
        summary.num_active_parameters < summary.num_parameters - summary.num_routed_parameters + routed_active
    )


def test_weights_are_as_readable_as_the_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", size="tiny", num_shards=2)
    modes = {file.suffix: file.stat().st_mode for file in (tmp_path / "m").iterdir()}
    assert modes[".safetensors"] == modes[".json"]
