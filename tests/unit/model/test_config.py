import json
import math
from pathlib import Path
from typing import Any

import pytest

from model.config import INT8_SCHEME, ModelConfig, YarnConfig, load_config
from model.errors import CheckpointInvalid, ConfigInvalid
from tests.reference_data import SHAPES, checkpoint_dir, unit_parameters
from tests.unit.model.harness import SMALL_CONFIG

WITH_DEFAULT = {"rope_scaling", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0}


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**SMALL_CONFIG, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_configs_are_read(shape: str) -> None:
    raw = json.loads((checkpoint_dir(shape) / "config.json").read_text())
    config = load_config(checkpoint_dir(shape))
    assert config.index_topk == raw["index_topk"]
    assert (
        config.cache_layout().width == raw["kv_lora_rank"] + raw["qk_rope_head_dim"] + raw["index_head_dim"]
    )
    assert (config.weight_block_size is not None) == (shape == "fp8")


def test_layers_of_a_model_with_mtp() -> None:
    config = _config(num_hidden_layers=4, first_k_dense_replace=2)
    assert config.moe_layer_ids == (2, 3)
    assert config.expert_layer_ids == (2, 3, 4)
    assert config.num_cache_layers == 5
    assert [config.is_moe_layer(i) for i in range(5)] == [False, False, True, True, True]


def test_layers_of_a_model_without_mtp() -> None:
    config = _config(num_nextn_predict_layers=0)
    assert config.expert_layer_ids == config.moe_layer_ids == (1,)


def test_softmax_scale_equals_the_golden() -> None:
    expected = unit_parameters()["softmax_scale"]
    real = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "index_head_dim": 128}
    assert math.isclose(_config(**real, rope_scaling=YARN).softmax_scale, expected["real"], rel_tol=1e-12)
    assert math.isclose(_config(**real).softmax_scale, expected["short"], rel_tol=1e-12)


def test_yarn_scales_cosines_where_the_two_mscales_differ() -> None:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=1.0)
    assert math.isclose(yarn.rope_scale, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))


def test_equal_mscales_leave_cosines_alone() -> None:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    assert yarn.rope_scale == 1.0


def test_rope_parameters_of_transformers_5_are_read() -> None:
    raw = {k: v for k, v in SMALL_CONFIG.items() if k not in ("rope_theta", "rope_scaling")}
    nested = {**YARN, "rope_type": "yarn", "rope_theta": 5000.0}
    config = ModelConfig.from_hf({**raw, "rope_parameters": nested})
    assert config.rope_theta == 5000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 40


@pytest.mark.parametrize("field", sorted(set(SMALL_CONFIG) - WITH_DEFAULT))
def test_missing_field_is_named(field: str) -> None:
    raw = {key: value for key, value in SMALL_CONFIG.items() if key != field}
    with pytest.raises(ConfigInvalid, match=field) as caught:
        ModelConfig.from_hf(raw)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "128"),
        ("hidden_size", True),
        ("hidden_size", 12.5),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", math.inf),
        ("model_type", "deepseek_v3"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("norm_topk_prob", False),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("moe_layer_freq", 2),
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 5),
        ("num_experts_per_tok", 5),
        ("first_k_dense_replace", 3),
        ("qk_rope_head_dim", 3),
        ("index_head_dim", 2),
        ("num_nextn_predict_layers", 2),
        ("eos_token_id", 40),
        ("rope_scaling", 7),
        ("quantization_config", "fp8"),
    ],
)
def test_value_that_is_not_computed_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        _config(**{field: value})
    assert caught.value.field == field
    assert caught.value.given == value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"type": "linear"}, "rope_scaling.type"),
        ({"factor": 0.5}, "rope_scaling.factor"),
        ({"factor": None}, "rope_scaling.factor"),
        ({"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings"),
        ({"beta_fast": "x"}, "rope_scaling.beta_fast"),
    ],
)
def test_yarn_fields_are_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        _config(rope_scaling={**YARN, **changes})
    assert caught.value.field == field


def _int8_quantization(**changes: Any) -> dict[str, Any]:
    groups = {"g": {"targets": ["Linear"], **{part: dict(keys) for part, keys in INT8_SCHEME.items()}}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": groups,
        **changes,
    }


def test_int8_channels_are_read() -> None:
    config = _config(quantization_config=_int8_quantization())
    assert config.has_int8_channels
    assert config.weight_block_size is None
    assert not _config().has_int8_channels


def test_keys_that_compressed_tensors_leaves_out_have_its_defaults() -> None:
    quantization = _int8_quantization()
    del quantization["config_groups"]["g"]["weights"]["symmetric"]
    del quantization["config_groups"]["g"]["weights"]["dynamic"]
    assert _config(quantization_config=quantization).has_int8_channels


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("weights", "num_bits", 4),
        ("weights", "type", "float"),
        ("weights", "symmetric", False),
        ("weights", "strategy", "group"),
        ("weights", "strategy", None),
        ("input_activations", "dynamic", False),
        ("input_activations", "strategy", "tensor"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_named(part: str, key: str, value: object) -> None:
    quantization = _int8_quantization()
    quantization["config_groups"]["g"][part][key] = value
    with pytest.raises(ConfigInvalid) as caught:
        _config(quantization_config=quantization)
    assert caught.value.field == f"quantization_config.config_groups.g.{part}.{key}"
    assert caught.value.given == value


@pytest.mark.parametrize(
    ("quantization", "field"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method"),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, "quantization_config.weight_block_size"),
        ({"quant_method": "fp8"}, "quantization_config.weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "quantization_config.format"),
        (_int8_quantization(format="pack-quantized"), "quantization_config.format"),
        (_int8_quantization(config_groups={}), "quantization_config.config_groups"),
        (_int8_quantization(config_groups=[]), "quantization_config.config_groups"),
        (_int8_quantization(config_groups={"g": 1}), "quantization_config.config_groups.g.weights"),
        (
            _int8_quantization(config_groups={"g": {"weights": INT8_SCHEME["weights"]}}),
            "quantization_config.config_groups.g.input_activations",
        ),
    ],
)
def test_quantization_fields_are_named(quantization: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        _config(quantization_config=quantization)
    assert caught.value.field == field


def test_no_config_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize(("text", "problem"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_broken_config_json(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointInvalid, match=problem):
        load_config(tmp_path)
