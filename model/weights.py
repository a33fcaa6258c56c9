"""The weights of the model in memory, float32, and how they are read from a checkpoint.

Attention workers hold `ModelWeights` (all but the routed experts), expert workers hold `ExpertWeights`.
Letters: V vocabulary, D hidden, Q query rank, H heads, N nope width, P rope width, O value width per head,
C latent, J indexer heads, I indexer width, E logical experts, F MLP width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.tensor_names import expected_tensors, expert_prefix, layer_prefix, mlp_tensors

OnProgress = Callable[[int, int], None]
"""Called with (tensors read, tensors in all)."""


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """One SwiGLU: down(silu(gate x) * up x)."""

    gate_FD: Tensor
    """(F, D)."""
    up_FD: Tensor
    """(F, D)."""
    down_DF: Tensor
    """(D, F)."""


@dataclass(frozen=True, kw_only=True)
class ExpertWeights(MlpWeights):
    """One routed expert: a SwiGLU of width moe_intermediate_size."""


@dataclass(frozen=True, kw_only=True)
class IndexerWeights:
    """Sparse attention's indexer of one layer."""

    query_JIQ: Tensor
    """wq_b: (J * I, Q)."""
    key_ID: Tensor
    """wk: (I, D)."""
    key_norm_I: Tensor
    """k_norm.weight: (I,)."""
    key_bias_I: Tensor
    """k_norm.bias: (I,)."""
    head_JD: Tensor
    """weights_proj: (J, D)."""


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Latent attention of one layer."""

    query_a_QD: Tensor
    """q_a_proj: (Q, D)."""
    query_norm_Q: Tensor
    """q_a_layernorm: (Q,)."""
    query_b_HQ: Tensor
    """q_b_proj: (H * (N + P), Q)."""
    latent_CD: Tensor
    """kv_a_proj_with_mqa: (C + P, D)."""
    latent_norm_C: Tensor
    """kv_a_layernorm: (C,)."""
    key_HNC: Tensor
    """kv_b_proj's key half: (H, N, C)."""
    value_HCO: Tensor
    """kv_b_proj's value half, transposed: (H, C, O)."""
    output_DHO: Tensor
    """o_proj: (D, H * O)."""
    indexer: IndexerWeights


@dataclass(frozen=True, kw_only=True)
class MoeWeights:
    """What an attention worker holds of a MoE layer."""

    gate_ED: Tensor
    """(E, D)."""
    bias_E: Tensor
    """e_score_correction_bias: (E,), for choosing only."""
    shared: MlpWeights


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder block; exactly one of mlp and moe is there."""

    input_norm_D: Tensor
    """(D,)."""
    attention: AttentionWeights
    post_norm_D: Tensor
    """(D,)."""
    mlp: MlpWeights | None
    moe: MoeWeights | None


@dataclass(frozen=True, kw_only=True)
class MtpWeights:
    """The multi-token-prediction layer."""

    embed_VD: Tensor
    """(V, D)."""
    embed_norm_D: Tensor
    """enorm: (D,)."""
    hidden_norm_D: Tensor
    """hnorm: (D,)."""
    join_D2D: Tensor
    """eh_proj: (D, 2 D), embedding half first."""
    layer: LayerWeights
    norm_D: Tensor
    """shared_head.norm: (D,)."""
    head_VD: Tensor
    """shared_head.head: (V, D)."""


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """Everything but the routed experts."""

    embed_VD: Tensor
    """(V, D)."""
    layers: tuple[LayerWeights, ...]
    """Main layers."""
    norm_D: Tensor
    """(D,)."""
    head_VD: Tensor
    """lm_head: (V, D)."""
    mtp: MtpWeights | None


def load_expert(
    checkpoint: Checkpoint, *, layer_idx: int, expert_idx: int, device: torch.device | str = "cpu"
) -> ExpertWeights:
    """One routed expert; reads its three tensors (and their scales) and nothing else.

    Raises:
        CheckpointInvalid: one of them is missing or misshapen.
    """
    config = checkpoint.config
    prefix = expert_prefix(layer_idx, expert_idx)
    shapes = mlp_tensors(prefix, config.hidden_size, config.moe_intermediate_size)
    gate, up, down = (checkpoint.read(name, shape=shape).to(device) for name, shape in shapes.items())
    return ExpertWeights(gate_FD=gate, up_FD=up, down_DF=down)


def load_model_weights(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", on_progress: OnProgress | None = None
) -> ModelWeights:
    """Everything but the routed experts.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """
    return _ModelReader(checkpoint, device=device, on_progress=on_progress).read_model()


class _ModelReader:
    """Reads tensors by name and counts them."""

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device | str, on_progress: OnProgress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._device = device
        self._on_progress = on_progress
        shapes = expected_tensors(self._config)
        self._shapes = {name: shape for name, shape in shapes.items() if ".mlp.experts." not in name}
        self._num_read = 0

    def read_model(self) -> ModelWeights:
        config = self._config
        layers = tuple(self._layer(layer_prefix(i), i) for i in range(config.num_hidden_layers))
        return ModelWeights(
            embed_VD=self._read("model.embed_tokens.weight"),
            layers=layers,
            norm_D=self._read("model.norm.weight"),
            head_VD=self._read("lm_head.weight"),
            mtp=self._mtp(config.num_hidden_layers) if config.num_nextn_predict_layers else None,
        )

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name, shape=self._shapes[name]).to(self._device)
        self._num_read += 1
        if self._on_progress is not None:
            self._on_progress(self._num_read, len(self._shapes))
        return tensor

    def _layer(self, prefix: str, layer_idx: int) -> LayerWeights:
        is_moe = self._config.is_moe_layer(layer_idx)
        return LayerWeights(
            input_norm_D=self._read(f"{prefix}input_layernorm.weight"),
            attention=self._attention(f"{prefix}self_attn."),
            post_norm_D=self._read(f"{prefix}post_attention_layernorm.weight"),
            mlp=None if is_moe else self._mlp(f"{prefix}mlp."),
            moe=self._moe(f"{prefix}mlp.") if is_moe else None,
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        config = self._config
        kv_b = self._read(f"{prefix}kv_b_proj.weight")
        nope = config.qk_nope_head_dim
        kv_b_HXC = kv_b.view(config.num_attention_heads, nope + config.v_head_dim, -1)
        return AttentionWeights(
            query_a_QD=self._read(f"{prefix}q_a_proj.weight"),
            query_norm_Q=self._read(f"{prefix}q_a_layernorm.weight"),
            query_b_HQ=self._read(f"{prefix}q_b_proj.weight"),
            latent_CD=self._read(f"{prefix}kv_a_proj_with_mqa.weight"),
            latent_norm_C=self._read(f"{prefix}kv_a_layernorm.weight"),
            key_HNC=kv_b_HXC[:, :nope].contiguous(),
            value_HCO=kv_b_HXC[:, nope:].transpose(1, 2).contiguous(),
            output_DHO=self._read(f"{prefix}o_proj.weight"),
            indexer=self._indexer(f"{prefix}indexer."),
        )

    def _indexer(self, prefix: str) -> IndexerWeights:
        return IndexerWeights(
            query_JIQ=self._read(f"{prefix}wq_b.weight"),
            key_ID=self._read(f"{prefix}wk.weight"),
            key_norm_I=self._read(f"{prefix}k_norm.weight"),
            key_bias_I=self._read(f"{prefix}k_norm.bias"),
            head_JD=self._read(f"{prefix}weights_proj.weight"),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        return MlpWeights(
            gate_FD=self._read(f"{prefix}gate_proj.weight"),
            up_FD=self._read(f"{prefix}up_proj.weight"),
            down_DF=self._read(f"{prefix}down_proj.weight"),
        )

    def _moe(self, prefix: str) -> MoeWeights:
        return MoeWeights(
            gate_ED=self._read(f"{prefix}gate.weight"),
            bias_E=self._read(f"{prefix}gate.e_score_correction_bias"),
            shared=self._mlp(f"{prefix}shared_experts."),
        )

    def _mtp(self, layer_idx: int) -> MtpWeights:
        prefix = layer_prefix(layer_idx)
        return MtpWeights(
            embed_VD=self._read(f"{prefix}embed_tokens.weight"),
            embed_norm_D=self._read(f"{prefix}enorm.weight"),
            hidden_norm_D=self._read(f"{prefix}hnorm.weight"),
            join_D2D=self._read(f"{prefix}eh_proj.weight"),
            layer=self._layer(prefix, layer_idx),
            norm_D=self._read(f"{prefix}shared_head.norm.weight"),
            head_VD=self._read(f"{prefix}shared_head.head.weight"),
        )
