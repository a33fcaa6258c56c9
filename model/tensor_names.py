"""The tensors of a DeepSeek-V3.2 checkpoint in the HF layout: every name, with its shape."""

from model.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(config: ModelConfig) -> Shapes:
    """Every weight that a checkpoint of this config holds; FP8 scales are not listed."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer_idx in range(config.num_cache_layers):
        shapes |= layer_tensors(config, layer_idx)
    for layer_idx in range(config.num_hidden_layers, config.num_cache_layers):
        shapes |= _mtp_tensors(config, layer_prefix(layer_idx))
    return shapes


def layer_prefix(layer_idx: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer_idx}."


def expert_prefix(layer_idx: int, expert_idx: int) -> str:
    """What the names of one routed expert's tensors begin with."""
    return f"{layer_prefix(layer_idx)}mlp.experts.{expert_idx}."


def is_routed_expert(name: str) -> bool:
    """Whether a tensor is one of a routed expert's."""
    return ".mlp.experts." in name


def layer_tensors(config: ModelConfig, layer_idx: int) -> Shapes:
    """The tensors of one decoder block, routed experts included."""
    prefix, hidden = layer_prefix(layer_idx), config.hidden_size
    shapes: Shapes = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    shapes |= _attention_tensors(config, f"{prefix}self_attn.")
    if not config.is_moe_layer(layer_idx):
        return shapes | mlp_tensors(f"{prefix}mlp.", hidden, config.intermediate_size)
    shapes[f"{prefix}mlp.gate.weight"] = (config.n_routed_experts, hidden)
    shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
    shared_width = config.moe_intermediate_size * config.n_shared_experts
    shapes |= mlp_tensors(f"{prefix}mlp.shared_experts.", hidden, shared_width)
    for expert_idx in range(config.n_routed_experts):
        shapes |= mlp_tensors(expert_prefix(layer_idx, expert_idx), hidden, config.moe_intermediate_size)
    return shapes


def mlp_tensors(prefix: str, hidden: int, width: int) -> Shapes:
    """The three matrices of one SwiGLU, dense, shared or routed."""
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def _attention_tensors(config: ModelConfig, prefix: str) -> Shapes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_rank, latent = config.q_lora_rank, config.kv_lora_rank
    index_width = config.index_head_dim
    kv_out = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return {
        f"{prefix}q_a_proj.weight": (q_rank, hidden),
        f"{prefix}q_a_layernorm.weight": (q_rank,),
        f"{prefix}q_b_proj.weight": (heads * config.qk_head_dim, q_rank),
        f"{prefix}kv_a_proj_with_mqa.weight": (latent + config.qk_rope_head_dim, hidden),
        f"{prefix}kv_a_layernorm.weight": (latent,),
        f"{prefix}kv_b_proj.weight": (kv_out, latent),
        f"{prefix}o_proj.weight": (hidden, heads * config.v_head_dim),
        f"{prefix}indexer.wq_b.weight": (config.index_n_heads * index_width, q_rank),
        f"{prefix}indexer.wk.weight": (index_width, hidden),
        f"{prefix}indexer.k_norm.weight": (index_width,),
        f"{prefix}indexer.k_norm.bias": (index_width,),
        f"{prefix}indexer.weights_proj.weight": (config.index_n_heads, hidden),
    }


def _mtp_tensors(config: ModelConfig, prefix: str) -> Shapes:
    hidden, vocab = config.hidden_size, config.vocab_size
    return {
        f"{prefix}embed_tokens.weight": (vocab, hidden),
        f"{prefix}enorm.weight": (hidden,),
        f"{prefix}hnorm.weight": (hidden,),
        f"{prefix}eh_proj.weight": (hidden, 2 * hidden),
        f"{prefix}shared_head.norm.weight": (hidden,),
        f"{prefix}shared_head.head.weight": (vocab, hidden),
    }
