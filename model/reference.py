"""DeepSeek-V3.2 once more, slow and plain: the fast code is compared with it, the trainer differentiates it.

Whole sequences of one length, no cache, keys and values expanded per head, float32, gradients to every
tensor. It shares nothing with the rest of the package but the config type: a mistake has to be made twice to
go unseen.

Letters: B sequences, T tokens (queries), S tokens (keys), D hidden, V vocabulary, H heads, N nope width,
P rope width, O value width, J indexer heads, I indexer width, E logical experts, G groups, K top-k,
U selected positions, R rows here: the B * T tokens laid end to end.

Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1 and 2.2; DeepSeek-V3.2-Exp's report, section 2 (indexer).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig

Attention = Literal["sparse", "dense", "dense with indexer"]
"""Sparse is the model. Dense looks at every position and runs no indexer; the third runs it without obeying
it: what the trainer needs before the indexer has learnt anything."""


@dataclass(frozen=True, kw_only=True)
class ReferenceOutput:
    """Everything that one forward pass computes and chooses; maps are by layer, the MTP layer included.

    With B sequences every (T, ...) has B * T rows, the sequences laid end to end.
    """

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
    """(T, S), -inf where s > t. No gradient reaches the layer's input, only the indexer's own weights.

    Source: DeepSeek-V3.2-Exp's report, section 2.1.1: the indexer's input is detached.
    """
    attention_shares: Mapping[int, Tensor]
    """(T, S), the mean over heads of what attention gave to each position; no gradient, rows sum to 1."""
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

    def forward(
        self, token_ids: Sequence[int] | Tensor, *, attention: Attention = "sparse"
    ) -> ReferenceOutput:
        """Runs one sequence of T >= 1 tokens, or B sequences of T tokens each, given as (B, T)."""
        ids = torch.as_tensor(token_ids)
        token_ids_BT = ids if ids.dim() == 2 else ids[None]
        return _Pass(self, self._tensors, self._zero_first_embedding, attention).run(token_ids_BT)


class _Pass:
    """One forward pass; keeps what it chose."""

    def __init__(
        self, model: Reference, tensors: Mapping[str, Tensor], zero_first: bool, attention: Attention
    ) -> None:
        self.config = model.config
        self.tensors = tensors
        self.zero_first = zero_first
        self.attention_kind = attention
        self.num_sequences = 1
        self.expert_ids: dict[int, Tensor] = {}
        self.expert_weights: dict[int, Tensor] = {}
        self.indexer_ids: dict[int, Tensor] = {}
        self.index_scores: dict[int, Tensor] = {}
        self.attention_shares: dict[int, Tensor] = {}

    def run(self, token_ids_BT: Tensor) -> ReferenceOutput:
        self.num_sequences = len(token_ids_BT)
        x_RD = self.embed("model.embed_tokens", token_ids_BT)
        hidden = []
        for layer_idx in range(self.config.num_hidden_layers):
            hidden.append(x_RD)
            x_RD = self.block(x_RD, layer_idx)
        x_RD = self.rms_norm(x_RD, "model.norm")
        hidden.append(x_RD)
        has_mtp = self.config.num_nextn_predict_layers > 0 and token_ids_BT.shape[1] > 1
        return ReferenceOutput(
            logits_TV=x_RD @ self.weight("lm_head").T,
            hidden=tuple(hidden),
            mtp_logits=self.mtp(x_RD, token_ids_BT) if has_mtp else None,
            expert_ids=self.expert_ids,
            expert_weights=self.expert_weights,
            indexer_ids=self.indexer_ids,
            index_scores=self.index_scores,
            attention_shares=self.attention_shares,
        )

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"].float()

    def embed(self, name: str, token_ids_BT: Tensor) -> Tensor:
        return functional.embedding(token_ids_BT, self.weight(name)).flatten(0, 1)

    def by_sequence(self, rows: Tensor) -> Tensor:
        """(R, ...) -> (B, T, ...)."""
        return rows.reshape(self.num_sequences, -1, *rows.shape[1:])

    def rms_norm(self, x_RD: Tensor, name: str) -> Tensor:
        variance = x_RD.pow(2).mean(-1, keepdim=True)
        return x_RD / torch.sqrt(variance + self.config.rms_norm_eps) * self.weight(name)

    def mtp(self, hidden_RD: Tensor, token_ids_BT: Tensor) -> Tensor:
        layer_idx = self.config.num_hidden_layers
        prefix = f"model.layers.{layer_idx}"
        hidden_RD = self.by_sequence(hidden_RD)[:, :-1].flatten(0, 1)
        embed_RD = self.embed(f"{prefix}.embed_tokens", token_ids_BT[:, 1:])
        if self.zero_first:
            is_first_BT = torch.arange(token_ids_BT.shape[1] - 1).expand(self.num_sequences, -1) == 0
            embed_RD = embed_RD.masked_fill(is_first_BT.flatten()[:, None], 0.0)
        parts = (self.rms_norm(embed_RD, f"{prefix}.enorm"), self.rms_norm(hidden_RD, f"{prefix}.hnorm"))
        x_RD = torch.cat(parts, dim=-1) @ self.weight(f"{prefix}.eh_proj").T
        x_RD = self.rms_norm(self.block(x_RD, layer_idx), f"{prefix}.shared_head.norm")
        return x_RD @ self.weight(f"{prefix}.shared_head.head").T

    def block(self, x_RD: Tensor, layer_idx: int) -> Tensor:
        prefix = f"model.layers.{layer_idx}"
        x_RD = x_RD + self.attention(self.rms_norm(x_RD, f"{prefix}.input_layernorm"), layer_idx)
        normed_RD = self.rms_norm(x_RD, f"{prefix}.post_attention_layernorm")
        if layer_idx < self.config.first_k_dense_replace:
            return x_RD + self.mlp(normed_RD, f"{prefix}.mlp")
        return x_RD + self.moe(normed_RD, layer_idx)

    def attention(self, x_RD: Tensor, layer_idx: int) -> Tensor:
        config, prefix = self.config, f"model.layers.{layer_idx}.self_attn"
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q_latent = self.rms_norm(x_RD @ self.weight(f"{prefix}.q_a_proj").T, f"{prefix}.q_a_layernorm")
        q_BTHX = self.by_sequence((q_latent @ self.weight(f"{prefix}.q_b_proj").T).view(len(x_RD), heads, -1))
        q_BTHX = torch.cat((q_BTHX[..., :nope], _rope_pairs(q_BTHX[..., nope:], config)), dim=-1)
        kv = x_RD @ self.weight(f"{prefix}.kv_a_proj_with_mqa").T
        latent = self.rms_norm(kv[:, : config.kv_lora_rank], f"{prefix}.kv_a_layernorm")
        key_rope_BSHP = self.by_sequence(kv[:, None, config.kv_lora_rank :])
        key_rope_BSHP = _rope_pairs(key_rope_BSHP, config).expand(-1, -1, heads, -1)
        expanded = self.by_sequence(
            (latent @ self.weight(f"{prefix}.kv_b_proj").T).view(len(x_RD), heads, -1)
        )
        key_BSHX = torch.cat((expanded[..., :nope], key_rope_BSHP), dim=-1)
        value_BSHO = expanded[..., nope:]
        score_BHTS = torch.einsum("bthx,bshx->bhts", q_BTHX, key_BSHX) * _softmax_scale(config)
        is_hidden_BTS = ~self.select(x_RD, q_latent, layer_idx)
        share_BHTS = score_BHTS.masked_fill(is_hidden_BTS[:, None], -math.inf).softmax(-1)
        if self.attention_kind != "dense":
            self.attention_shares[layer_idx] = share_BHTS.detach().mean(1).flatten(0, 1)
        output = torch.einsum("bhts,bsho->btho", share_BHTS, value_BSHO).flatten(2).flatten(0, 1)
        return output @ self.weight(f"{prefix}.o_proj").T

    def select(self, x_RD: Tensor, q_latent: Tensor, layer_idx: int) -> Tensor:
        """(B, T, S) bool: the positions that attention looks at."""
        num_tokens = len(x_RD) // self.num_sequences
        future_TS = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        past_BTS = (~future_TS).expand(self.num_sequences, -1, -1)
        if self.attention_kind == "dense":
            return past_BTS
        score_BTS = self.score(x_RD.detach(), q_latent.detach(), layer_idx).masked_fill(future_TS, -math.inf)
        self.index_scores[layer_idx] = score_BTS.flatten(0, 1)
        if self.attention_kind == "dense with indexer":
            return past_BTS
        # Stable: of equal scores (relu makes exact zeros) the earlier position wins.
        in_order_BTS = score_BTS.detach().sort(dim=-1, descending=True, stable=True).indices
        best_BTU = in_order_BTS[..., : self.config.index_topk]
        is_kept_BTS = torch.zeros_like(past_BTS).scatter(-1, best_BTU, value=True) & past_BTS
        places_BTU = best_BTU.masked_fill(~is_kept_BTS.gather(-1, best_BTU), num_tokens).sort(-1).values
        self.indexer_ids[layer_idx] = places_BTU.masked_fill(places_BTU == num_tokens, -1).flatten(0, 1)
        return is_kept_BTS

    def score(self, x_RD: Tensor, q_latent: Tensor, layer_idx: int) -> Tensor:
        """(B, T, S): how much the indexer wants query t to see position s, the future included."""
        config, prefix = self.config, f"model.layers.{layer_idx}.self_attn.indexer"
        heads, rope = config.index_n_heads, config.qk_rope_head_dim
        q_BTJI = self.by_sequence((q_latent @ self.weight(f"{prefix}.wq_b").T).view(len(x_RD), heads, -1))
        k_RI = functional.layer_norm(
            x_RD @ self.weight(f"{prefix}.wk").T,
            (config.index_head_dim,),
            self.weight(f"{prefix}.k_norm"),
            self.tensors[f"{prefix}.k_norm.bias"].float(),
            eps=1e-6,
        )
        k_BSJI = self.by_sequence(k_RI[:, None])
        q_BTJI = torch.cat((_rope_halves(q_BTJI[..., :rope], config), q_BTJI[..., rope:]), dim=-1)
        k_BSJI = torch.cat((_rope_halves(k_BSJI[..., :rope], config), k_BSJI[..., rope:]), dim=-1)
        head_BTJ = self.by_sequence(x_RD @ self.weight(f"{prefix}.weights_proj").T) * heads**-0.5
        match_BTJS = torch.einsum("btji,bsi->btjs", q_BTJI, k_BSJI[:, :, 0]).relu()
        score_BTS: Tensor = torch.einsum("btjs,btj->bts", match_BTJS, head_BTJ) * config.index_head_dim**-0.5
        return score_BTS

    def moe(self, x_RD: Tensor, layer_idx: int) -> Tensor:
        prefix = f"model.layers.{layer_idx}.mlp"
        ids_RK, weights_RK = self.gate(x_RD, prefix)
        self.expert_ids[layer_idx], self.expert_weights[layer_idx] = ids_RK, weights_RK
        by_expert = ids_RK.flatten().argsort(stable=True)
        rows = by_expert // self.config.num_experts_per_tok
        num_rows = ids_RK.flatten().bincount(minlength=self.config.n_routed_experts).tolist()
        parts = torch.split_with_sizes(x_RD.index_select(0, rows), num_rows)
        routed = [self.mlp(part, f"{prefix}.experts.{idx}") for idx, part in enumerate(parts) if len(part)]
        weighted = torch.cat(routed) * weights_RK.flatten()[by_expert, None]
        return self.mlp(x_RD, f"{prefix}.shared_experts").index_add(0, rows, weighted)

    def gate(self, x_RD: Tensor, prefix: str) -> tuple[Tensor, Tensor]:
        config = self.config
        score_RE = (x_RD @ self.weight(f"{prefix}.gate").T).sigmoid()
        biased_RE = score_RE.detach() + self.tensors[f"{prefix}.gate.e_score_correction_bias"].float()
        biased_RGX = biased_RE.view(len(x_RD), config.n_group, -1)
        best_two_RG = biased_RGX.sort(-1, descending=True).values[..., :2].sum(-1)
        groups = best_two_RG.argsort(-1, descending=True)[:, : config.topk_group]
        is_open_RG = torch.zeros_like(best_two_RG, dtype=torch.bool).scatter(1, groups, value=True)
        open_RE = biased_RGX.masked_fill(~is_open_RG[..., None], -math.inf).flatten(1)
        ids_RK = open_RE.argsort(-1, descending=True)[:, : config.num_experts_per_tok].sort(-1).values
        chosen_RK = score_RE.gather(1, ids_RK)
        return ids_RK, chosen_RK / chosen_RK.sum(-1, keepdim=True) * config.routed_scaling_factor

    def mlp(self, x_RD: Tensor, name: str) -> Tensor:
        gate = functional.silu(x_RD @ self.weight(f"{name}.gate_proj").T)
        return (gate * (x_RD @ self.weight(f"{name}.up_proj").T)) @ self.weight(f"{name}.down_proj").T


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


def _rope_pairs(x_BTHP: Tensor, config: ModelConfig) -> Tensor:
    """Turns neighbours (2i, 2i + 1) as complex numbers."""
    cos, sin = _angles(x_BTHP.shape[1], config)
    pairs = torch.view_as_complex(x_BTHP.reshape(*x_BTHP.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _rope_halves(x_BTJP: Tensor, config: ModelConfig) -> Tensor:
    """Turns value i of the first half with value i of the second."""
    cos, sin = _angles(x_BTJP.shape[1], config)
    turned = torch.cat((-x_BTJP[..., x_BTJP.shape[-1] // 2 :], x_BTJP[..., : x_BTJP.shape[-1] // 2]), dim=-1)
    return x_BTJP * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)
