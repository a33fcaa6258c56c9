"""The weights of the model in memory, and how they are read from a checkpoint.

Attention workers hold `ModelWeights` (all but the routed experts), expert workers hold experts,
`model.matrix.Mlp` each. Which kernels pack them, and in which form, is said when they are loaded.

Letters: V vocabulary, D hidden, Q query rank, H heads, N nope width, P rope width, O value width per head,
C latent, J indexer heads, I indexer width, E logical experts, F MLP width.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.heap import HeapTrimmer, trim_heap
from model.kernels.base import AbsorbedHeads, CacheNorms, Kernels
from model.matrix import HeadMatrix, JoinedMatrix, Matrix, Mlp
from model.precision import Form, Precision, expert_form, head_form, matrix_form
from model.tensor_names import expected_tensors, expert_prefix, layer_prefix, mlp_tensors

OnProgress = Callable[[int, int], None]
"""Called with (tensors read, tensors in all)."""


@dataclass(frozen=True, kw_only=True)
class IndexerWeights:
    """Sparse attention's indexer of one layer; its key norm is among the cache's norms."""

    query_JIQ: Matrix
    """wq_b: (J * I, Q)."""
    head_JD: Matrix
    """weights_proj: (J, D), float32 in every precision."""


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Latent attention of one layer."""

    inputs_FD: JoinedMatrix
    """q_a_proj (Q, D), kv_a_proj_with_mqa (C + P, D) and the indexer's wk (I, D)."""
    query_norm_Q: Tensor
    """q_a_layernorm: (Q,)."""
    query_b_HQ: Matrix
    """q_b_proj: (H * (N + P), Q)."""
    cache_norms: CacheNorms
    """kv_a_layernorm and the indexer's k_norm."""
    expand_HVC: HeadMatrix
    """kv_b_proj: (H, N + O, C), keys and values of every head."""
    absorbed: AbsorbedHeads
    """The same, for attention over latents."""
    output_DHO: Matrix
    """o_proj: (D, H * O)."""
    indexer: IndexerWeights


@dataclass(frozen=True, kw_only=True)
class MoeWeights:
    """What an attention worker holds of a MoE layer."""

    gate_ED: Matrix
    """(E, D), float32 in every precision."""
    bias_E: Tensor
    """e_score_correction_bias: (E,), for choosing only."""
    shared: Mlp


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder block; exactly one of mlp and moe is there."""

    input_norm_D: Tensor
    """(D,)."""
    attention: AttentionWeights
    post_norm_D: Tensor
    """(D,)."""
    mlp: Mlp | None
    moe: MoeWeights | None


@dataclass(frozen=True, kw_only=True)
class MtpWeights:
    """The multi-token-prediction layer."""

    embed_VD: Tensor
    """(V, D), as stored."""
    embed_norm_D: Tensor
    """enorm: (D,)."""
    hidden_norm_D: Tensor
    """hnorm: (D,)."""
    join_D2D: Matrix
    """eh_proj: (D, 2 D), embedding half first."""
    layer: LayerWeights
    norm_D: Tensor
    """shared_head.norm: (D,)."""
    head_VD: Matrix
    """shared_head.head: (V, D)."""


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """Everything but the routed experts."""

    embed_VD: Tensor
    """(V, D), as stored."""
    layers: tuple[LayerWeights, ...]
    """Main layers."""
    norm_D: Tensor
    """(D,)."""
    head_VD: Matrix
    """lm_head: (V, D)."""
    mtp: MtpWeights | None


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How weights are held."""

    kernels: Kernels
    precision: Precision = "auto"
    device: torch.device | str = "cpu"
    num_threads: int = 1
    """Experts read at the same time."""


def load_expert(checkpoint: Checkpoint, packing: Packing, *, layer_idx: int, expert_idx: int) -> Mlp:
    """One routed expert; reads its three tensors (and their scales) and nothing else.

    Raises:
        CheckpointInvalid: one of them is missing or misshapen.
    """
    config = checkpoint.config
    prefix = expert_prefix(layer_idx, expert_idx)
    shapes = mlp_tensors(prefix, config.hidden_size, config.moe_intermediate_size)
    gate, up, down = (checkpoint.read_stored(name, shape=shape) for name, shape in shapes.items())
    return packing.kernels.pack_mlp(gate, up, down, expert_form(packing.precision, stored=gate.form))


def load_experts(
    checkpoint: Checkpoint,
    packing: Packing,
    wanted: Sequence[tuple[int, int]],
    *,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[tuple[int, int], Mlp]]:
    """The routed experts (layer_idx, expert_idx) of `wanted`, in that order, several read at the same time.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """

    def load(place: tuple[int, int]) -> Mlp:
        return load_expert(checkpoint, packing, layer_idx=place[0], expert_idx=place[1])

    trimmer = HeapTrimmer()
    with ThreadPoolExecutor(packing.num_threads, thread_name_prefix="loading") as pool:
        for num_read, (place, mlp) in enumerate(zip(wanted, pool.map(load, wanted), strict=True), start=1):
            if on_progress is not None:
                on_progress(num_read, len(wanted))
            trimmer.count(mlp.num_bytes)
            yield place, mlp
    trim_heap()


def _head_form(precision: Precision, kv_b_HVC: Tensor) -> Form:
    """The form of kv_b_proj's heads, which cut through FP8 blocks.

    It is bfloat16 where that is asked for or loses nothing, as with power-of-two scales.
    """
    if precision == "float32":
        return "float32"
    is_exact = torch.equal(kv_b_HVC.to(torch.bfloat16).to(torch.float32), kv_b_HVC)
    return "bfloat16" if is_exact or precision == "bfloat16" else "float32"


def load_model_weights(
    checkpoint: Checkpoint, packing: Packing, *, on_progress: OnProgress | None = None
) -> ModelWeights:
    """Everything but the routed experts.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """
    return _ModelReader(checkpoint, packing, on_progress=on_progress).read_model()


class _ModelReader:
    """Reads tensors by name and counts them."""

    def __init__(self, checkpoint: Checkpoint, packing: Packing, *, on_progress: OnProgress | None) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._packing = packing
        self._on_progress = on_progress
        shapes = expected_tensors(self._config)
        self._shapes = {name: shape for name, shape in shapes.items() if ".mlp.experts." not in name}
        self._num_read = 0

    def read_model(self) -> ModelWeights:
        config = self._config
        layers = tuple(self._layer(layer_prefix(i), i) for i in range(config.num_hidden_layers))
        return ModelWeights(
            embed_VD=self._embedding("model.embed_tokens.weight"),
            layers=layers,
            norm_D=self._vector("model.norm.weight"),
            head_VD=self._head("lm_head.weight"),
            mtp=self._mtp(config.num_hidden_layers) if config.num_nextn_predict_layers else None,
        )

    def _count(self, num_tensors: int = 1) -> None:
        self._num_read += num_tensors
        if self._on_progress is not None:
            self._on_progress(self._num_read, len(self._shapes))

    def _vector(self, name: str) -> Tensor:
        """A norm or bias in float32; the copy leaves the mapped file."""
        tensor = self._checkpoint.read(name, shape=self._shapes[name])
        self._count()
        return tensor.to(self._packing.device, copy=True)

    def _embedding(self, name: str) -> Tensor:
        """Rows are picked from it and converted then; the copy leaves the mapped file."""
        stored = self._checkpoint.read_stored(name, shape=self._shapes[name])
        self._count()
        values_VD = stored.to_float32() if stored.is_quantised else stored.values_FD
        return values_VD.to(self._packing.device, copy=True)

    def _matrix(self, name: str, *, is_exact: bool = False) -> Matrix:
        """A matrix in the form of the precision, or in float32."""
        stored = self._checkpoint.read_stored(name, shape=self._shapes[name])
        self._count()
        form = matrix_form("float32" if is_exact else self._packing.precision, stored=stored.form)
        return self._packing.kernels.pack(stored, form)

    def _head(self, name: str) -> Matrix:
        """An output head."""
        stored = self._checkpoint.read_stored(name, shape=self._shapes[name])
        self._count()
        return self._packing.kernels.pack(stored, head_form(self._packing.precision, stored=stored.form))

    def _layer(self, prefix: str, layer_idx: int) -> LayerWeights:
        is_moe = self._config.is_moe_layer(layer_idx)
        weights = LayerWeights(
            input_norm_D=self._vector(f"{prefix}input_layernorm.weight"),
            attention=self._attention(f"{prefix}self_attn."),
            post_norm_D=self._vector(f"{prefix}post_attention_layernorm.weight"),
            mlp=None if is_moe else self._mlp(f"{prefix}mlp."),
            moe=self._moe(f"{prefix}mlp.") if is_moe else None,
        )
        trim_heap()
        return weights

    def _attention(self, prefix: str) -> AttentionWeights:
        config, nope = self._config, self._config.qk_nope_head_dim
        name = f"{prefix}kv_b_proj.weight"
        kv_b = self._checkpoint.read_stored(name, shape=self._shapes[name])
        kv_b_HVC = kv_b.to_float32().view(config.num_attention_heads, nope + config.v_head_dim, -1)
        self._count()
        form = _head_form(self._packing.precision, kv_b_HVC)
        pack_heads = self._packing.kernels.pack_heads
        return AttentionWeights(
            inputs_FD=self._joined(
                [f"{prefix}{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk")]
            ),
            query_norm_Q=self._vector(f"{prefix}q_a_layernorm.weight"),
            query_b_HQ=self._matrix(f"{prefix}q_b_proj.weight"),
            cache_norms=CacheNorms(
                latent_C=self._vector(f"{prefix}kv_a_layernorm.weight"),
                key_I=self._vector(f"{prefix}indexer.k_norm.weight"),
                key_bias_I=self._vector(f"{prefix}indexer.k_norm.bias"),
                eps=config.rms_norm_eps,
            ),
            expand_HVC=pack_heads(kv_b_HVC, form),
            absorbed=AbsorbedHeads(
                key_HCN=pack_heads(kv_b_HVC[:, :nope].transpose(1, 2), form),
                value_HOC=pack_heads(kv_b_HVC[:, nope:], form),
            ),
            output_DHO=self._matrix(f"{prefix}o_proj.weight"),
            indexer=IndexerWeights(
                query_JIQ=self._matrix(f"{prefix}indexer.wq_b.weight"),
                head_JD=self._matrix(f"{prefix}indexer.weights_proj.weight", is_exact=True),
            ),
        )

    def _joined(self, names: Sequence[str]) -> JoinedMatrix:
        stored = [self._checkpoint.read_stored(name, shape=self._shapes[name]) for name in names]
        self._count(len(names))
        forms = [matrix_form(self._packing.precision, stored=part.form) for part in stored]
        return self._packing.kernels.pack_joined(stored, forms)

    def _mlp(self, prefix: str) -> Mlp:
        names = [f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (self._checkpoint.read_stored(name, shape=self._shapes[name]) for name in names)
        self._count(len(names))
        form = matrix_form(self._packing.precision, stored=gate.form)
        return self._packing.kernels.pack_mlp(gate, up, down, form)

    def _moe(self, prefix: str) -> MoeWeights:
        return MoeWeights(
            gate_ED=self._matrix(f"{prefix}gate.weight", is_exact=True),
            bias_E=self._vector(f"{prefix}gate.e_score_correction_bias"),
            shared=self._mlp(f"{prefix}shared_experts."),
        )

    def _mtp(self, layer_idx: int) -> MtpWeights:
        prefix = layer_prefix(layer_idx)
        return MtpWeights(
            embed_VD=self._embedding(f"{prefix}embed_tokens.weight"),
            embed_norm_D=self._vector(f"{prefix}enorm.weight"),
            hidden_norm_D=self._vector(f"{prefix}hnorm.weight"),
            join_D2D=self._matrix(f"{prefix}eh_proj.weight"),
            layer=self._layer(prefix, layer_idx),
            norm_D=self._vector(f"{prefix}shared_head.norm.weight"),
            head_VD=self._head(f"{prefix}shared_head.head.weight"),
        )
