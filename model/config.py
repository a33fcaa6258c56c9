"""The architecture of one checkpoint, read from its config.json: every number that the arithmetic needs."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from model.cache_layout import CacheLayout, KeyForm
from model.errors import CheckpointInvalid, ConfigInvalid

INDEXER_NORM_EPS = 1e-6
"""Epsilon of the indexer's LayerNorm: fixed by the architecture, in no config key."""

_FIXED: Mapping[str, object] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
"""Keys with one value that this code computes; absent is that value."""

INT8_SCHEME: Mapping[str, Mapping[str, object]] = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    },
}
"""What every group of a compressed-tensors config says: one INT8 factor an output channel, one a token."""
_SCHEME_DEFAULTS: Mapping[str, object] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
"""What compressed-tensors takes for a key that is left out."""


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension: how rope_scaling stretches the rotary frequencies."""

    factor: float
    """Context extension, >= 1."""
    original_max_position_embeddings: int
    """Context length before the extension, tokens."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are slowed by the whole factor."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def rope_scale(self) -> float:
        """Factor on cos and sin: 1 when mscale equals mscale_all_dim, as in every published checkpoint."""
        return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale: m^2 with m = 0.1 * mscale_all_dim * ln(factor) + 1.

        Example: factor 40, mscale_all_dim 1: m = 1.3689, factor 1.8739.
        """
        return _mscale(self.factor, self.mscale_all_dim) ** 2


def _mscale(factor: float, mscale: float) -> float:
    """Source: YaRN (arXiv 2309.00071), section 3.4, with DeepSeek's coefficient."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """DeepSeek-V3.2's architecture; field names are the keys of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense layers' MLP."""
    moe_intermediate_size: int
    """Width of one expert's MLP."""
    num_hidden_layers: int
    """Main layers; MTP layers come after them."""
    first_k_dense_replace: int
    """Layers [0, this) are dense, the others MoE."""
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnConfig | None
    """None: plain rotary embedding. Given: YaRN at every length, also below the original context."""
    num_nextn_predict_layers: int
    """MTP layers; 0 or 1."""
    weight_block_size: int | None
    """Side of the FP8 blocks (quantization_config.weight_block_size); None: none in FP8."""
    has_int8_channels: bool
    """Whether routed experts may be stored in INT8, with a factor for each output channel."""
    bos_token_id: int
    eos_token_id: int

    @classmethod
    def from_hf(cls, raw: Mapping[str, object]) -> "ModelConfig":
        """The config of a parsed config.json; keys that the arithmetic does not need are ignored.

        Raises:
            ConfigInvalid: a key is missing or has a value that this code does not compute.
        """
        _check_fixed(raw)
        rope = _rope_keys(raw)
        given = {
            "rope_scaling": _parse_yarn(rope),
            "rope_theta": _number(rope, "rope_theta"),
            **_parse_quantization(raw),
            "rms_norm_eps": _number(raw, "rms_norm_eps"),
            "routed_scaling_factor": _number(raw, "routed_scaling_factor"),
            "num_nextn_predict_layers": _integer(raw, "num_nextn_predict_layers", low=0, default=0),
            "first_k_dense_replace": _integer(raw, "first_k_dense_replace", low=0),
            "bos_token_id": _integer(raw, "bos_token_id", low=0, default=0),
            "eos_token_id": _integer(raw, "eos_token_id", low=0, default=1),
        }
        for field in fields(cls):
            if field.name not in given:
                given[field.name] = _integer(raw, field.name, low=1)
        config = cls(**given)  # type: ignore[arg-type]  # each was checked above
        _check_together(config)
        return config

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (main or MTP) routes to experts."""
        return layer_idx >= self.first_k_dense_replace

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Main layers with experts, ascending."""
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def expert_layer_ids(self) -> tuple[int, ...]:
        """Every layer with experts, the MTP layer included, ascending."""
        return tuple(range(self.first_k_dense_replace, self.num_cache_layers))

    @property
    def num_cache_layers(self) -> int:
        """Layers that keep cache rows: main and MTP."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query: nope and rope parts together."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def cache_layout(self, key_form: KeyForm = "float32") -> CacheLayout:
        """What the cache holds of a token and layer."""
        return CacheLayout(
            latent=self.kv_lora_rank,
            rope=self.qk_rope_head_dim,
            index=self.index_head_dim,
            key_form=key_form,
        )

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores: qk_head_dim^-0.5, times YaRN's m^2."""
        yarn = self.rope_scaling
        return float(self.qk_head_dim**-0.5 * (1.0 if yarn is None else yarn.softmax_factor))


def load_config(checkpoint_dir: Path) -> ModelConfig:
    """The config of a checkpoint directory.

    Raises:
        CheckpointInvalid: there is no config.json, or it is not a JSON object.
        ConfigInvalid: a key of it cannot be used.
    """
    path = checkpoint_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointInvalid(str(path), problem="no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(str(path), problem=f"not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointInvalid(str(path), problem="not a JSON object")
    return ModelConfig.from_hf(raw)


def _integer(raw: Mapping[str, object], key: str, *, low: int, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigInvalid(key, wanted=f"an integer >= {low}", given=value)
    return value


def _number(raw: Mapping[str, object], key: str, *, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigInvalid(key.removeprefix("rope_scaling."), wanted="a number > 0", given=value)
    return float(value)


def _check_fixed(raw: Mapping[str, object]) -> None:
    model_type = raw.get("model_type")
    if model_type != "deepseek_v32":
        raise ConfigInvalid("model_type", wanted="'deepseek_v32'", given=model_type)
    for key, wanted in _FIXED.items():
        if raw.get(key, wanted) != wanted:
            raise ConfigInvalid(key, wanted=repr(wanted), given=raw[key])


def _rope_keys(raw: Mapping[str, object]) -> Mapping[str, object]:
    """The rotary keys in one mapping: transformers 5 moved them, and rope_theta, into rope_parameters."""
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise ConfigInvalid("rope_scaling", wanted="an object or null", given=nested)
    theta = nested.get("rope_theta", raw.get("rope_theta"))
    return {**nested, "rope_theta": theta}


def _parse_yarn(rope: Mapping[str, object]) -> YarnConfig | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigInvalid("rope_scaling.type", wanted="'yarn' or null", given=kind)
    try:
        yarn = YarnConfig(
            factor=_number(rope, "factor"),
            original_max_position_embeddings=_integer(rope, "original_max_position_embeddings", low=1),
            beta_fast=_number(rope, "beta_fast", default=32.0),
            beta_slow=_number(rope, "beta_slow", default=1.0),
            mscale=_number(rope, "mscale", default=1.0),
            mscale_all_dim=_number(rope, "mscale_all_dim", default=0.0),
        )
    except ConfigInvalid as error:
        raise ConfigInvalid(f"rope_scaling.{error.field}", wanted=error.wanted, given=error.given) from None
    if yarn.factor < 1:
        raise ConfigInvalid("rope_scaling.factor", wanted="a number >= 1", given=yarn.factor)
    return yarn


def _parse_quantization(raw: Mapping[str, object]) -> dict[str, object]:
    """weight_block_size and has_int8_channels."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        return {"weight_block_size": None, "has_int8_channels": False}
    if not isinstance(quantization, Mapping):
        raise ConfigInvalid("quantization_config", wanted="an object or null", given=quantization)
    method = quantization.get("quant_method")
    if method == "fp8":
        return {"weight_block_size": _parse_block_size(quantization), "has_int8_channels": False}
    if method == "compressed-tensors":
        _check_int8_scheme(quantization)
        return {"weight_block_size": None, "has_int8_channels": True}
    wanted = "'fp8' or 'compressed-tensors'"
    raise ConfigInvalid("quantization_config.quant_method", wanted=wanted, given=method)


def _parse_block_size(quantization: Mapping[str, object]) -> int:
    block = quantization.get("weight_block_size")
    sides = set(block) if isinstance(block, list) and len(block) == 2 else set()
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ConfigInvalid("quantization_config.weight_block_size", wanted="[n, n]", given=block)
    return side


def _check_int8_scheme(quantization: Mapping[str, object]) -> None:
    """Of compressed-tensors' many schemes, only the one that precision int8 computes."""
    field, given = "quantization_config.format", quantization.get("format")
    if given != "int-quantized":
        raise ConfigInvalid(field, wanted="'int-quantized'", given=given)
    field, groups = "quantization_config.config_groups", quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigInvalid(field, wanted="an object with a group", given=groups)
    for name, group in groups.items():
        for part, scheme in INT8_SCHEME.items():
            said = group.get(part) if isinstance(group, Mapping) else None
            if not isinstance(said, Mapping):
                raise ConfigInvalid(f"{field}.{name}.{part}", wanted="an object", given=said)
            for key, wanted in scheme.items():
                given = said.get(key, _SCHEME_DEFAULTS.get(key))
                if given != wanted:
                    raise ConfigInvalid(f"{field}.{name}.{part}.{key}", wanted=repr(wanted), given=given)


def _check_together(config: ModelConfig) -> None:
    """Conditions that tie two fields."""
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise ConfigInvalid("n_group", wanted=f"a divisor of n_routed_experts {experts}", given=groups)
    if experts // groups < 2:
        raise ConfigInvalid("n_group", wanted="groups of at least two experts", given=groups)
    if config.topk_group > groups:
        raise ConfigInvalid("topk_group", wanted=f"at most n_group {groups}", given=config.topk_group)
    eligible = experts // groups * config.topk_group
    if config.num_experts_per_tok > eligible:
        wanted = f"at most the {eligible} experts of {config.topk_group} groups"
        raise ConfigInvalid("num_experts_per_tok", wanted=wanted, given=config.num_experts_per_tok)
    if config.first_k_dense_replace > config.num_hidden_layers:
        wanted = f"at most num_hidden_layers {config.num_hidden_layers}"
        raise ConfigInvalid("first_k_dense_replace", wanted=wanted, given=config.first_k_dense_replace)
    if config.qk_rope_head_dim % 2:
        raise ConfigInvalid("qk_rope_head_dim", wanted="an even number", given=config.qk_rope_head_dim)
    if config.index_head_dim < config.qk_rope_head_dim:
        wanted = f"at least qk_rope_head_dim {config.qk_rope_head_dim}"
        raise ConfigInvalid("index_head_dim", wanted=wanted, given=config.index_head_dim)
    if config.num_nextn_predict_layers > 1:
        given = config.num_nextn_predict_layers
        raise ConfigInvalid("num_nextn_predict_layers", wanted="0 or 1", given=given)
    for key in ("bos_token_id", "eos_token_id"):
        if getattr(config, key) >= config.vocab_size:
            wanted = f"below vocab_size {config.vocab_size}"
            raise ConfigInvalid(key, wanted=wanted, given=getattr(config, key))
