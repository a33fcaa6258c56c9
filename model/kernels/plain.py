"""The kernels in torch: the reference of the native ones, what runs without a compiler, and on GPUs.

Letters as in model/kernels/base.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.batch import LaterRows, LayerCache, PendingRows
from model.config import INDEXER_NORM_EPS, ModelConfig
from model.kernels.base import WEIGHT_FLOOR, AbsorbedHeads, Assignments, CacheNorms, Reads
from model.kernels.plain_attention import attend_causal, attend_expanded, attend_selected, row_blocks
from model.linear import head_linear, linear
from model.matrix import (
    LOW_UNITS,
    ApartMatrices,
    HeadMatrix,
    JoinedMatrix,
    Matrix,
    Mlp,
    StoredMatrix,
    quantize_rows,
    split_rows,
)
from model.norms import layer_norm, rms_norm
from model.precision import Form
from model.rope import RopeTable, rotate_front, rotate_interleaved

EXACT_TERMS = 1024
"""Products of two INT8 codes whose sum float32 holds exactly: 1024 * 127^2 < 2^24."""
CODE_ZERO = 128
"""The byte that stands for 0 in an INT8 key."""


@dataclass(frozen=True, kw_only=True)
class PlainMatrix:
    """A matrix as it is stored, brought to float32 for each product."""

    stored: StoredMatrix

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        scale_inv = self.stored.scale_inv
        return self.stored.values_FD.nbytes + (0 if scale_inv is None else scale_inv.nbytes)

    def __call__(self, x_RD: Tensor) -> Tensor:
        """`x @ W.T`: (R, F)."""
        return linear(x_RD, self.stored.to_float32())


@dataclass(frozen=True, kw_only=True)
class PlainInt8Matrix:
    """An INT8 matrix times rows of two INT8 parts; products add up exactly, in any order."""

    codes_FD: Tensor
    """(F, D) int8."""
    factor_F: Tensor
    """(F,) float32."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self.codes_FD.nbytes + self.factor_F.nbytes

    def __call__(self, x_RD: Tensor) -> Tensor:
        """`x @ W.T`: (R, F)."""
        high_RD, low_RD, factor_R = split_rows(x_RD)
        product_RF = self._dot(high_RD) * LOW_UNITS + self._dot(low_RD)
        return product_RF * factor_R[:, None] * self.factor_F

    def _dot(self, code_RD: Tensor) -> Tensor:
        """Products of whole numbers, added up exactly and rounded once: (R, F) float32."""
        exact_RF = torch.zeros(len(code_RD), len(self.codes_FD), dtype=torch.float64, device=code_RD.device)
        for begin in range(0, code_RD.shape[1], EXACT_TERMS):
            part = slice(begin, begin + EXACT_TERMS)
            exact_RF += code_RD[:, part] @ self.codes_FD[:, part].to(torch.float32).t()
        return exact_RF.to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class PlainHeads:
    """One matrix a head."""

    weights_HFD: Tensor
    """(H, F, D) float32 or bfloat16."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self.weights_HFD.nbytes

    def __call__(self, x_RHD: Tensor) -> Tensor:
        """Each head's product: (R, H, F)."""
        return head_linear(x_RHD, self.weights_HFD.to(torch.float32).transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class PlainMlp:
    """A SwiGLU of three matrices."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes

    def __call__(self, x_RD: Tensor) -> Tensor:
        """`down(silu(gate x) * up x)`: (R, D)."""
        return self.down(torch.mul(functional.silu(self.gate(x_RD)), self.up(x_RD)))

    def begin(self, x_RD: Tensor) -> PendingRows:
        """Nothing until the rows are asked for: torch has no threads beside the caller's."""
        return LaterRows(self, x_RD)


class TorchKernels:
    """Every kernel in torch, on one device."""

    name = "torch"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def start(self) -> None:
        """Nothing: torch's threads and memory are its own."""

    def pack(self, stored: StoredMatrix, form: Form) -> Matrix:
        """A matrix held in a form, on the device."""
        if form == "int8":
            codes_FD, factor_F = stored.to_int8()
            return PlainInt8Matrix(codes_FD=self._own(codes_FD), factor_F=self._own(factor_F))
        if form == "fp8":
            blocks = stored.to_blocks()
            scale_inv = None if blocks.scale_inv is None else self._own(blocks.scale_inv)
            values_FD = self._own(blocks.values_FD)
            return PlainMatrix(
                stored=StoredMatrix(values_FD=values_FD, scale_inv=scale_inv, block=blocks.block)
            )
        dtype = torch.float32 if form == "float32" else torch.bfloat16
        values_FD = stored.to_float32() if stored.is_quantised else stored.values_FD
        return PlainMatrix(stored=StoredMatrix(values_FD=values_FD.to(self._device, dtype, copy=True)))

    def _own(self, stored: Tensor) -> Tensor:
        """A copy on the device, which does not keep the checkpoint's file mapped."""
        return stored.to(self._device, copy=True)

    def pack_joined(self, stored: Sequence[StoredMatrix], forms: Sequence[Form]) -> JoinedMatrix:
        """Matrices one after another."""
        return ApartMatrices(
            parts=tuple(self.pack(part, form) for part, form in zip(stored, forms, strict=True))
        )

    def pack_heads(self, weights_HFD: Tensor, form: Form) -> HeadMatrix:
        """One matrix a head; forms without a torch operator are held in bfloat16."""
        dtype = torch.float32 if form == "float32" else torch.bfloat16
        return PlainHeads(weights_HFD=weights_HFD.to(self._device, dtype).contiguous())

    def pack_mlp(self, gate: StoredMatrix, up: StoredMatrix, down: StoredMatrix, form: Form) -> Mlp:
        """A SwiGLU."""
        return PlainMlp(gate=self.pack(gate, form), up=self.pack(up, form), down=self.pack(down, form))

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """The norm of each row."""
        return rms_norm(x_TD, weight_D, eps=eps)

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """Adds in place, then norms."""
        return rms_norm(x_TD.add_(delta_TD), weight_D, eps=eps)

    def rotate_queries(self, query_THQ: Tensor, table: RopeTable, config: ModelConfig) -> Tensor:
        """Queries turned and scaled."""
        nope_THN, rope_THP = query_THQ.tensor_split((config.qk_nope_head_dim,), dim=-1)
        return torch.cat((nope_THN, rotate_interleaved(rope_THP, table)), dim=-1) * config.softmax_scale

    def rotate_index_queries(self, query_TJI: Tensor, table: RopeTable) -> Tensor:
        """The indexer's queries turned."""
        return rotate_front(query_TJI, table)

    def store_rows(
        self, latent_TX: Tensor, key_TI: Tensor, norms: CacheNorms, table: RopeTable, cached: LayerCache
    ) -> None:
        """Norms, turns and writes."""
        latent_TC, rope_TP = latent_TX.tensor_split((len(norms.latent_C),), dim=-1)
        latent_TC = rms_norm(latent_TC, norms.latent_C, eps=norms.eps)
        rope_TP = rotate_interleaved(rope_TP[:, None], table)[:, 0]
        key_TI = layer_norm(key_TI, norms.key_I, norms.key_bias_I, eps=INDEXER_NORM_EPS)
        key_TI = rotate_front(key_TI[:, None], table)[:, 0]
        if cached.layout.key_form == "int8":
            key_TI = _key_places(key_TI)
        cached.append(torch.cat((latent_TC, rope_TP, key_TI), dim=-1))

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """The gate's choice."""
        score_TE = logits_TE.sigmoid()
        choice_TE = _keep_best_groups(score_TE + bias_E, config)
        ids_TK = choice_TE.topk(config.num_experts_per_tok, dim=-1).indices
        chosen_TK = score_TE.gather(1, ids_TK)
        total_T1 = chosen_TK.sum(-1, keepdim=True) + WEIGHT_FLOOR
        return ids_TK.to(torch.int32), chosen_TK / total_T1 * config.routed_scaling_factor

    def attend_expanded(
        self, query_RHQ: Tensor, expand_HVC: HeadMatrix, cached: LayerCache, reads: Reads
    ) -> Tensor:
        """Causal attention over keys and values of every head."""
        num_rows, num_heads, _ = query_RHQ.shape
        seen_S = reads.context_S[: reads.first_position + num_rows]
        rows_SW, layout = cached.rows_NW.index_select(0, seen_S), cached.layout
        kv_SHV = expand_HVC(rows_SW[:, None, : layout.latent].expand(-1, num_heads, -1))
        rope_SP = rows_SW[:, layout.latent : layout.key_begin]
        return attend_expanded(query_RHQ, kv_SHV, rope_SP, first_position=reads.first_position)

    def attend_absorbed(
        self, query_RHQ: Tensor, heads: AbsorbedHeads, cached: LayerCache, reads: Sequence[Reads]
    ) -> Tensor:
        """Attention over the latent itself."""
        nope_RHN, rope_RHP = query_RHQ.tensor_split((query_RHQ.shape[-1] - cached.layout.rope,), dim=-1)
        query_RHX = torch.cat((heads.key_HCN(nope_RHN), rope_RHP), dim=-1)
        latent_width, width, parts = cached.layout.latent, query_RHX.shape[-1], []
        for part_RHX, read in zip(torch.split(query_RHX, [r.num_rows for r in reads]), reads, strict=True):
            if read.selected_RU is not None:
                selected = read.selected_RU
                parts.append(attend_selected(part_RHX, cached.rows_NW, selected, latent_width=latent_width))
                continue
            key_SX = cached.rows_NW.index_select(0, read.context_S)[:, :width]
            first = read.first_position
            parts.append(attend_causal(part_RHX, key_SX, first_position=first, latent_width=latent_width))
        return heads.value_HOC(torch.cat(parts))

    def index_scores(self, query_RJI: Tensor, head_RJ: Tensor, cached: LayerCache, reads: Reads) -> Tensor:
        """The indexer's scores."""
        num_rows, num_heads, _ = query_RJI.shape
        place_SI = cached.rows_NW.index_select(0, reads.context_S)[:, cached.layout.key_begin :]
        factor_S: Tensor | float = 1.0
        if cached.layout.key_form == "int8":
            place_SI, factor_S = _codes_of_places(place_SI)
            query_RJI, query_factor_RJ = quantize_rows(query_RJI)
            head_RJ = head_RJ * query_factor_RJ
        parts = []
        for begin, end in row_blocks(num_rows, num_heads * len(place_SI)):
            score_MS = linear(query_RJI[begin:end].flatten(0, 1), place_SI)
            score_RJS = score_MS.view(end - begin, num_heads, -1).relu_()
            parts.append(score_RJS.mul_(head_RJ[begin:end, :, None]).sum(1) * factor_S)
        return torch.cat(parts)

    def select_positions(self, score_RS: Tensor, *, first_position: int, num_selected: int) -> Tensor:
        """The best visible positions."""
        num_rows, num_cached = score_RS.shape
        columns = torch.arange(num_cached, device=score_RS.device)
        rows = torch.arange(first_position, first_position + num_rows, device=score_RS.device)
        score_RS = score_RS.masked_fill(columns > rows[:, None], -math.inf)
        last_kept = score_RS.topk(num_selected, dim=-1).values[:, -1:]
        above, tied = score_RS > last_kept, score_RS == last_kept
        num_tied = num_selected - above.sum(-1, keepdim=True)
        kept = above | (tied & (tied.cumsum(-1) <= num_tied))
        return kept.nonzero()[:, 1].view(num_rows, num_selected)

    def gather_experts(self, experts: Mapping[int, Mlp]) -> Mapping[int, Mlp]:
        """As they are."""
        return experts

    def expert_sums(self, x_RD: Tensor, assignments: Assignments, experts: Mapping[int, Mlp]) -> Tensor:
        """Each expert once, over all its rows."""
        sums_RD = x_RD.new_zeros(x_RD.shape, dtype=torch.float64)
        order_A = assignments.expert_idx_A.argsort(stable=True)
        counts_E = assignments.expert_idx_A.bincount().tolist()
        for expert_idx, part in enumerate(torch.split(order_A, counts_E)):
            if not len(part):
                continue
            rows = assignments.row_idx_A[part]
            output = experts[expert_idx](x_RD[rows]) * assignments.weights_A[part, None]
            sums_RD.index_add_(0, rows, output.to(torch.float64))
        return sums_RD


def _key_places(key_TI: Tensor) -> Tensor:
    """INT8 keys as a cache row holds them (CacheLayout): (T, I / 4 + 1) float32."""
    code_TI, factor_T = quantize_rows(key_TI)
    places = (code_TI + CODE_ZERO).to(torch.uint8).contiguous().view(torch.float32)
    return torch.cat((places, factor_T[:, None]), dim=-1)


def _codes_of_places(place_SI: Tensor) -> tuple[Tensor, Tensor]:
    """What `_key_places` was given: codes (S, I) float32 and factors (S,)."""
    code_SI = place_SI[:, :-1].contiguous().view(torch.uint8).to(torch.float32) - CODE_ZERO
    return code_SI, place_SI[:, -1]


def _keep_best_groups(choice_TE: Tensor, config: ModelConfig) -> Tensor:
    """(T, E) with -inf in all but the topk_group groups whose two best scores have the largest sum."""
    choice_TGX = choice_TE.view(len(choice_TE), config.n_group, -1)
    group_TG = choice_TGX.topk(2, dim=-1).values.sum(-1)
    kept_TG = group_TG.topk(config.topk_group, dim=-1).indices
    dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TG, value=False)
    kept_TE: Tensor = choice_TGX.masked_fill(dropped_TG[:, :, None], -math.inf).flatten(1)
    return kept_TE
