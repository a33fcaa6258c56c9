"""DeepSeek-V3.2 once more, slow and plain: the fast code is compared with it, the trainer differentiates it.

One sequence at a time, no cache, keys and values expanded per head, float32, gradients to every tensor. It
shares nothing with the rest of the package but the config type: a mistake has to be made twice to go unseen.

Letters: T tokens (queries), S tokens (keys), D hidden, V vocabulary, H heads, N nope width, P rope width,
O value width, J indexer heads, I indexer width, E logical experts, G groups, K top-k, U selected positions.

Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1 and 2.2; DeepSeek-V3.2-Exp's report, section 2 (indexer).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceOutput:
    """Everything that one forward pass computes and chooses; maps are by layer, the MTP layer included."""

    logits_TV: Tensor
    """(T, V): scores of the next token."""
    hidden: tuple[Tensor, ...]
    """(T, D) each: the residual stream before every main layer, then the state after the final norm."""
    expert_ids: Mapping[int, Tensor]
    """(T, K) int64, ascending."""
    expert_weights: Mapping[int, Tensor]
    """(T, K), in the order of expert_ids."""
    indexer_ids: Mapping[int, Tensor]
    """(T, U) int64, ascending, -1 padded; U = min(index_topk, T)."""
    index_scores: Mapping[int, Tensor]
    """(T, S), -inf where s > t."""
    mtp_logits: Tensor | None
    """(T - 1, V): row i scores token i + 2; None without an MTP layer, or for a single token."""


class Reference:
    """The model of some tensors, by their names in the HF layout."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], *, zero_first_embedding: bool = False
    ) -> None:
        self.config = config
        self._tensors = tensors
        self._zero_first_embedding = zero_first_embedding

    def forward(self, token_ids: Sequence[int] | Tensor) -> ReferenceOutput:
        """Runs one sequence of T >= 1 tokens."""
        return _Pass(self.config, self._tensors, self._zero_first_embedding).run(torch.as_tensor(token_ids))


class _Pass:
    """One forward pass; keeps what it chose."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], zero_first: bool) -> None:
        self.config = config
        self.tensors = tensors
        self.zero_first = zero_first
        self.expert_ids: dict[int, Tensor] = {}
        self.expert_weights: dict[int, Tensor] = {}
        self.indexer_ids: dict[int, Tensor] = {}
        self.index_scores: dict[int, Tensor] = {}

    def run(self, token_ids_T: Tensor) -> ReferenceOutput:
        x_TD = self.weight("model.embed_tokens")[token_ids_T]
        hidden = []
        for layer_idx in range(self.config.num_hidden_layers):
            hidden.append(x_TD)
            x_TD = self.block(x_TD, layer_idx)
        x_TD = self.rms_norm(x_TD, "model.norm")
        hidden.append(x_TD)
        has_mtp = self.config.num_nextn_predict_layers > 0 and len(token_ids_T) > 1
        return ReferenceOutput(
            logits_TV=x_TD @ self.weight("lm_head").T,
            hidden=tuple(hidden),
            mtp_logits=self.mtp(x_TD[:-1], token_ids_T[1:]) if has_mtp else None,
            expert_ids=self.expert_ids,
            expert_weights=self.expert_weights,
            indexer_ids=self.indexer_ids,
            index_scores=self.index_scores,
        )

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"].float()

    def rms_norm(self, x_TD: Tensor, name: str) -> Tensor:
        variance = x_TD.pow(2).mean(-1, keepdim=True)
        return x_TD / torch.sqrt(variance + self.config.rms_norm_eps) * self.weight(name)

    def mtp(self, hidden_TD: Tensor, next_ids_T: Tensor) -> Tensor:
        layer_idx = self.config.num_hidden_layers
        prefix = f"model.layers.{layer_idx}"
        embed_TD = self.weight(f"{prefix}.embed_tokens")[next_ids_T]
        if self.zero_first:
            embed_TD = torch.cat((torch.zeros_like(embed_TD[:1]), embed_TD[1:]))
        parts = (self.rms_norm(embed_TD, f"{prefix}.enorm"), self.rms_norm(hidden_TD, f"{prefix}.hnorm"))
        x_TD = torch.cat(parts, dim=-1) @ self.weight(f"{prefix}.eh_proj").T
        x_TD = self.rms_norm(self.block(x_TD, layer_idx), f"{prefix}.shared_head.norm")
        return x_TD @ self.weight(f"{prefix}.shared_head.head").T

    def block(self, x_TD: Tensor, layer_idx: int) -> Tensor:
        prefix = f"model.layers.{layer_idx}"
        x_TD = x_TD + self.attention(self.rms_norm(x_TD, f"{prefix}.input_layernorm"), layer_idx)
        normed_TD = self.rms_norm(x_TD, f"{prefix}.post_attention_layernorm")
        if layer_idx < self.config.first_k_dense_replace:
            return x_TD + self.mlp(normed_TD, f"{prefix}.mlp")
        return x_TD + self.moe(normed_TD, layer_idx)

    def attention(self, x_TD: Tensor, layer_idx: int) -> Tensor:
        config, prefix = self.config, f"model.layers.{layer_idx}.self_attn"
        num_tokens, heads, nope = len(x_TD), config.num_attention_heads, config.qk_nope_head_dim
        q_latent = self.rms_norm(x_TD @ self.weight(f"{prefix}.q_a_proj").T, f"{prefix}.q_a_layernorm")
        q_THX = (q_latent @ self.weight(f"{prefix}.q_b_proj").T).view(num_tokens, heads, -1)
        q_THX = torch.cat((q_THX[..., :nope], _rope_pairs(q_THX[..., nope:], config)), dim=-1)
        kv = x_TD @ self.weight(f"{prefix}.kv_a_proj_with_mqa").T
        latent = self.rms_norm(kv[:, : config.kv_lora_rank], f"{prefix}.kv_a_layernorm")
        key_rope_SHP = _rope_pairs(kv[:, None, config.kv_lora_rank :], config).expand(-1, heads, -1)
        expanded = (latent @ self.weight(f"{prefix}.kv_b_proj").T).view(num_tokens, heads, -1)
        key_SHX = torch.cat((expanded[..., :nope], key_rope_SHP), dim=-1)
        value_SHO = expanded[..., nope:]
        score_HTS = torch.einsum("thx,shx->hts", q_THX, key_SHX) * _softmax_scale(config)
        is_kept_TS = self.select(x_TD, q_latent, layer_idx)
        share_HTS = score_HTS.masked_fill(~is_kept_TS, -math.inf).softmax(-1)
        output = torch.einsum("hts,sho->tho", share_HTS, value_SHO).flatten(1)
        return output @ self.weight(f"{prefix}.o_proj").T

    def select(self, x_TD: Tensor, q_latent: Tensor, layer_idx: int) -> Tensor:
        """(T, S) bool: the indexer's choice."""
        config, prefix = self.config, f"model.layers.{layer_idx}.self_attn.indexer"
        num_tokens, rope = len(x_TD), config.qk_rope_head_dim
        q_TJI = (q_latent @ self.weight(f"{prefix}.wq_b").T).view(num_tokens, config.index_n_heads, -1)
        k_SI = functional.layer_norm(
            x_TD @ self.weight(f"{prefix}.wk").T,
            (config.index_head_dim,),
            self.weight(f"{prefix}.k_norm"),
            self.tensors[f"{prefix}.k_norm.bias"].float(),
            eps=1e-6,
        )
        q_TJI = torch.cat((_rope_halves(q_TJI[..., :rope], config), q_TJI[..., rope:]), dim=-1)
        k_SI = torch.cat((_rope_halves(k_SI[:, None, :rope], config)[:, 0], k_SI[:, rope:]), dim=-1)
        head_TJ = x_TD @ self.weight(f"{prefix}.weights_proj").T * config.index_n_heads**-0.5
        match_TJS = torch.einsum("tji,si->tjs", q_TJI, k_SI).relu()
        score_TS = torch.einsum("tjs,tj->ts", match_TJS, head_TJ) * config.index_head_dim**-0.5
        future_TS = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        score_TS = score_TS.masked_fill(future_TS, -math.inf)
        # Stable: of equal scores (relu makes exact zeros) the earlier position wins.
        best_TU = score_TS.sort(dim=-1, descending=True, stable=True).indices[:, : config.index_topk]
        is_kept_TS = torch.zeros_like(future_TS).scatter(1, best_TU, value=True) & ~future_TS
        in_order_TU = best_TU.masked_fill(~is_kept_TS.gather(1, best_TU), num_tokens).sort(-1).values
        self.index_scores[layer_idx] = score_TS
        self.indexer_ids[layer_idx] = in_order_TU.masked_fill(in_order_TU == num_tokens, -1)
        return is_kept_TS

    def moe(self, x_TD: Tensor, layer_idx: int) -> Tensor:
        prefix = f"model.layers.{layer_idx}.mlp"
        ids_TK, weights_TK = self.gate(x_TD, prefix)
        self.expert_ids[layer_idx], self.expert_weights[layer_idx] = ids_TK, weights_TK
        output_TD = self.mlp(x_TD, f"{prefix}.shared_experts")
        for expert_idx in range(self.config.n_routed_experts):
            rows, choices = (ids_TK == expert_idx).nonzero(as_tuple=True)
            if len(rows):
                routed = self.mlp(x_TD[rows], f"{prefix}.experts.{expert_idx}")
                output_TD = output_TD.index_add(0, rows, routed * weights_TK[rows, choices, None])
        return output_TD

    def gate(self, x_TD: Tensor, prefix: str) -> tuple[Tensor, Tensor]:
        config = self.config
        score_TE = (x_TD @ self.weight(f"{prefix}.gate").T).sigmoid()
        biased_TE = score_TE + self.tensors[f"{prefix}.gate.e_score_correction_bias"].float()
        biased_TGX = biased_TE.view(len(x_TD), config.n_group, -1)
        best_two_TG = biased_TGX.sort(-1, descending=True).values[..., :2].sum(-1)
        groups = best_two_TG.argsort(-1, descending=True)[:, : config.topk_group]
        is_open_TG = torch.zeros_like(best_two_TG, dtype=torch.bool).scatter(1, groups, value=True)
        open_TE = biased_TGX.masked_fill(~is_open_TG[..., None], -math.inf).flatten(1)
        ids_TK = open_TE.argsort(-1, descending=True)[:, : config.num_experts_per_tok].sort(-1).values
        chosen_TK = score_TE.gather(1, ids_TK)
        return ids_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True) * config.routed_scaling_factor

    def mlp(self, x_TD: Tensor, name: str) -> Tensor:
        gate = functional.silu(x_TD @ self.weight(f"{name}.gate_proj").T)
        return (gate * (x_TD @ self.weight(f"{name}.up_proj").T)) @ self.weight(f"{name}.down_proj").T


def _softmax_scale(config: ModelConfig) -> float:
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.factor > 1:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
    return scale


def _angles(num_tokens: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, P/2), YaRN included, pair by pair."""
    rope, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = [theta ** (-2 * pair / rope) for pair in range(rope // 2)]
    scale = 1.0
    if yarn is not None:
        original = yarn.original_max_position_embeddings
        fast, slow = (
            rope * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), rope - 1)
        for pair, plain in enumerate(frequencies):
            slowed = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
            frequencies[pair] = plain * (1 - slowed) + plain / yarn.factor * slowed
        log_factor = 0.1 * math.log(yarn.factor)
        scale = (log_factor * yarn.mscale + 1) / (log_factor * yarn.mscale_all_dim + 1)
    angle = torch.arange(num_tokens)[:, None, None] * torch.tensor(frequencies)
    return angle.cos() * scale, angle.sin() * scale


def _rope_pairs(x_THP: Tensor, config: ModelConfig) -> Tensor:
    """Turns neighbours (2i, 2i + 1) as complex numbers."""
    cos, sin = _angles(len(x_THP), config)
    pairs = torch.view_as_complex(x_THP.reshape(*x_THP.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _rope_halves(x_TJP: Tensor, config: ModelConfig) -> Tensor:
    """Turns value i of the first half with value i of the second."""
    cos, sin = _angles(len(x_TJP), config)
    turned = torch.cat((-x_TJP[..., x_TJP.shape[-1] // 2 :], x_TJP[..., : x_TJP.shape[-1] // 2]), dim=-1)
    return x_TJP * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)
