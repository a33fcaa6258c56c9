"""The architectures that `moray checkpoint make` writes, as config.json."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from model.byte_tokenizer import NUM_TOKENS

SizeName = Literal["tiny", "nano", "small", "deep", "bench-1b"]
DtypeName = Literal["float32", "bfloat16", "fp8"]

_COMMON: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.02,
        "use_cache": True,
    }
)

_YARN: Mapping[str, object] = MappingProxyType(
    {"type": "yarn", "factor": 8, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
)

_NANO: Mapping[str, object] = MappingProxyType(
    {
        "vocab_size": 1536,
        "hidden_size": 192,
        "intermediate_size": 512,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 64,
        "max_position_embeddings": 2048,
        "rope_scaling": {**_YARN, "factor": 4, "original_max_position_embeddings": 512},
    }
)

SIZES: Mapping[SizeName, Mapping[str, object]] = MappingProxyType(
    {
        "tiny": {
            "vocab_size": NUM_TOKENS,
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "index_n_heads": 4,
            "index_head_dim": 32,
            "index_topk": 64,
            "max_position_embeddings": 4096,
            "rope_scaling": {**_YARN, "original_max_position_embeddings": 512},
        },
        "nano": _NANO,
        "small": {
            "vocab_size": NUM_TOKENS,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "n_routed_experts": 64,
            "num_experts_per_tok": 8,
            "q_lora_rank": 192,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 256,
            "max_position_embeddings": 8192,
            "rope_scaling": {**_YARN, "original_max_position_embeddings": 1024},
        },
        # As many layers as make the MTP layer a small share of a step, as in V3.2, where it is one of 62.
        "deep": {**_NANO, "num_hidden_layers": 24},
        "bench-1b": {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "moe_intermediate_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "n_routed_experts": 64,
            "num_experts_per_tok": 8,
            "q_lora_rank": 384,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "index_n_heads": 8,
            "index_head_dim": 128,
            "index_topk": 2048,
            "max_position_embeddings": 16384,
            "rope_scaling": None,
        },
    }
)
"""Name -> what differs from the common keys."""


def hf_config(size: SizeName, *, dtype: DtypeName) -> dict[str, object]:
    """The config.json of a size, keys in the published order of meaning."""
    config: dict[str, object] = {**_COMMON, **SIZES[size]}
    config["num_key_value_heads"] = config["num_attention_heads"]
    config["torch_dtype"] = "float32" if dtype == "float32" else "bfloat16"
    if dtype == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
        }
    return config
