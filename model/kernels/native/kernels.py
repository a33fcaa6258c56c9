"""The kernels in C++ behind the interface of model/kernels/base.py. Letters as there."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from model.batch import LaterRows, LayerCache, PendingRows
from model.config import INDEXER_NORM_EPS, ModelConfig
from model.kernels.base import WEIGHT_FLOOR, AbsorbedHeads, Assignments, CacheNorms, Reads
from model.kernels.native.fit import fit_columns_of
from model.kernels.native.library import AbsorbedShape, CacheShape, ExpandedShape, GateShape, IndexerShape
from model.kernels.native.packed import Packed, can_stack, pack, pack_stack
from model.matrix import ApartMatrices, HeadMatrix, JoinedMatrix, Matrix, Mlp, StoredMatrix
from model.precision import Form
from model.rope import RopeTable

_FLOAT_BYTES = 4
FEW_ROWS = 64
"""Up to so many rows an MLP is one call; more rows are worth a product's own order of blocks."""
_Packed = TypeVar("_Packed")


class NativeMatrix:
    """A weight (F, D), or one for each of H heads."""

    def __init__(self, library: ctypes.CDLL, packed: Packed, *, num_threads: int, num_heads: int = 1) -> None:
        self._library = library
        self._packed = packed
        self._num_threads = num_threads
        self._num_heads = num_heads
        self.num_columns = packed.num_columns
        """F."""
        self.struct = packed.struct()
        """What the library takes."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self._packed.num_bytes

    def __call__(self, x: Tensor, /) -> Tensor:
        """(R, F) of (R, D); with heads (R, H, F) of (R, H, D)."""
        x = _rows(x)
        y = x.new_empty((*x.shape[:-1], self.num_columns))
        x_head, y_head = (x.stride(1), self.num_columns) if x.dim() == 3 else (0, 0)
        self._library.moray_gemm(
            self.struct, self._num_heads, x.data_ptr(), len(x), x.stride(0), x_head,
            y.data_ptr(), y[0].numel() if len(y) else 0, y_head, self._num_threads,
        )  # fmt: skip
        return y


class NativeJoined:
    """Weights of the same rows as one: their outputs stand beside each other, each in whole panels."""

    def __init__(self, matrix: NativeMatrix, widths: Sequence[int], *, panel: int) -> None:
        self._matrix = matrix
        ends = accumulate(-(-width // panel) * panel for width in widths)
        begins = [0, *ends][:-1]
        self._columns = [slice(begin, begin + width) for begin, width in zip(begins, widths, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that they hold."""
        return self._matrix.num_bytes

    def __call__(self, x_RD: Tensor, /) -> tuple[Tensor, ...]:
        """Each one's product: (R, F), a view."""
        y = self._matrix(x_RD)
        return tuple(y[:, columns] for columns in self._columns)


class _BegunRows:
    """Rows that other threads compute."""

    def __init__(self, library: ctypes.CDLL, ticket: int, y_RD: Tensor, *read: object) -> None:
        """Takes what the threads write and read, so that nobody else gets the memory before they end."""
        self._library = library
        self._ticket = ticket
        self._y_RD = y_RD
        self._read = read
        self._is_over = False

    def result(self) -> Tensor:
        """The rows."""
        if not self._is_over:
            self._library.moray_wait(self._ticket)
            self._is_over = True
        return self._y_RD

    def __del__(self) -> None:
        self.result()


class NativeMlp:
    """A SwiGLU: gate's panels and up's behind each other, and down."""

    def __init__(self, library: ctypes.CDLL, gate_up: Packed, down: Packed, *, num_threads: int) -> None:
        self._library = library
        self._gate_up = NativeMatrix(library, gate_up, num_threads=num_threads)
        self._down = NativeMatrix(library, down, num_threads=num_threads)
        self._inner_width = gate_up.num_columns // 2
        self._num_threads = num_threads
        self._structs = (gate_up.struct(), down.struct())
        self.gate_up_address, self.down_address = map(ctypes.addressof, self._structs)
        """Where their structs lie."""
        self.kind = gate_up.kind

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self._gate_up.num_bytes + self._down.num_bytes

    def __call__(self, x_RD: Tensor) -> Tensor:
        """(R, D); the inner width is padded to whole panels, with zeros."""
        if len(x_RD) <= FEW_ROWS:
            x_RD = _rows(x_RD)
            y_RD = torch.empty(len(x_RD), self._down.num_columns)
            self._library.moray_mlp(
                *self._structs, x_RD.data_ptr(), x_RD.stride(0), len(x_RD), y_RD.data_ptr(), self._num_threads
            )
            return y_RD
        joined = self._gate_up(x_RD)
        inner = joined.new_empty(len(joined), self._inner_width)
        self._library.moray_silu_multiply(
            joined.data_ptr(), len(joined), self._inner_width, inner.data_ptr(), self._num_threads
        )
        return self._down(inner)

    def begin(self, x_RD: Tensor) -> PendingRows:
        """Few rows are computed by all threads but the caller's, where there are any."""
        if self._num_threads == 1 or len(x_RD) > FEW_ROWS:
            return LaterRows(self, x_RD)
        x_RD = _rows(x_RD)
        y_RD = torch.empty(len(x_RD), self._down.num_columns)
        ticket = self._library.moray_begin_mlp(
            *self._structs, x_RD.data_ptr(), x_RD.stride(0), len(x_RD), y_RD.data_ptr(), self._num_threads - 1
        )
        return _BegunRows(self._library, ticket, y_RD, x_RD, self)


class NativeExperts(dict[int, Mlp]):
    """Experts of one layer, and a table of where their weights lie; it is not written to any more."""

    def __init__(self, experts: Mapping[int, Mlp]) -> None:
        super().__init__(experts)
        mlps = {expert_idx: _native(mlp, NativeMlp) for expert_idx, mlp in experts.items()}
        if len({mlp.kind for mlp in mlps.values()}) > 1:
            raise ValueError(f"experts {sorted(mlps)} are held in several forms")
        self.num_places = max(mlps, default=-1) + 1
        """Entries of each table: an expert's is at its index, 0 where there is none."""
        self._table = np.zeros((2, self.num_places), dtype=np.int64)
        for expert_idx, mlp in mlps.items():
            self._table[:, expert_idx] = mlp.gate_up_address, mlp.down_address
        self.gate_up_address, self.down_address = (row.ctypes.data for row in self._table)


class NativeKernels:
    """Every kernel in C++; the processor's threads are said once, here."""

    def __init__(self, name: str, library: ctypes.CDLL, *, num_threads: int) -> None:
        """Takes what `load_library` gave, and the threads that each kernel uses."""
        self.name = name
        self._library = library
        self._fit = fit_columns_of(library)
        self._num_threads = num_threads

    def start(self) -> None:
        """Keeps memory that is freed, and binds threads to processors where all of them are this process's.

        A scheduler that packs threads, as those of virtual machines do, runs both halves of a short kernel on
        one processor. With fewer threads than processors it is left alone.
        """
        self._library.moray_keep_memory()
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if self._num_threads == len(cpus) > 1:
            numbers = np.array(cpus, dtype=np.int32)
            self._library.moray_bind_threads(numbers.ctypes.data, len(cpus))

    def pack(self, stored: StoredMatrix, form: Form) -> Matrix:
        """A matrix in panels."""
        return NativeMatrix(self._library, pack(stored, form, fit=self._fit), num_threads=self._num_threads)

    def pack_joined(self, stored: Sequence[StoredMatrix], forms: Sequence[Form]) -> JoinedMatrix:
        """Matrices as one, where they are held alike."""
        if not can_stack(stored, forms):
            parts = tuple(self.pack(part, form) for part, form in zip(stored, forms, strict=True))
            return ApartMatrices(parts=parts)
        packed = pack_stack(stored, forms[0], fit=self._fit)
        matrix = NativeMatrix(self._library, packed, num_threads=self._num_threads)
        widths = [len(part.values_FD) for part in stored]
        return NativeJoined(matrix, widths, panel=packed.kind.panel)

    def pack_heads(self, weights_HFD: Tensor, form: Form) -> HeadMatrix:
        """One matrix a head; forms other than float32 are held in bfloat16."""
        held: Form = "float32" if form == "float32" else "bfloat16"
        parts = [StoredMatrix(values_FD=weight_FD) for weight_FD in weights_HFD]
        packed = pack_stack(parts, held, num_columns=weights_HFD.shape[1], fit=self._fit)
        return NativeMatrix(self._library, packed, num_threads=self._num_threads, num_heads=len(weights_HFD))

    def pack_mlp(self, gate: StoredMatrix, up: StoredMatrix, down: StoredMatrix, form: Form) -> Mlp:
        """A SwiGLU."""
        gate_up = pack_stack([gate, up], form, fit=self._fit)
        return NativeMlp(
            self._library, gate_up, pack(down, form, fit=self._fit), num_threads=self._num_threads
        )

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """The norm of each row."""
        return self._rms_norm(_rows(x_TD), 0, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """Adds in place, then norms."""
        delta_TD = delta_TD.contiguous()
        return self._rms_norm(x_TD, delta_TD.data_ptr(), weight_D, eps)

    def _rms_norm(self, x_TD: Tensor, delta_address: int, weight_D: Tensor, eps: float) -> Tensor:
        y_TD = torch.empty(x_TD.shape)
        self._library.moray_rms_norm(
            x_TD.data_ptr(), x_TD.stride(0), delta_address, weight_D.data_ptr(), eps, *x_TD.shape,
            y_TD.data_ptr(), self._num_threads,
        )  # fmt: skip
        return y_TD

    def rotate_queries(self, query_THQ: Tensor, table: RopeTable, config: ModelConfig) -> Tensor:
        """Queries turned and scaled, in place."""
        self._rotate(
            query_THQ, table, begin=config.qk_nope_head_dim, is_interleaved=True, scale=config.softmax_scale
        )
        return query_THQ

    def rotate_index_queries(self, query_TJI: Tensor, table: RopeTable) -> Tensor:
        """The indexer's queries turned, in place."""
        self._rotate(query_TJI, table, begin=0, is_interleaved=False, scale=1.0)
        return query_TJI

    def _rotate(
        self, x_THP: Tensor, table: RopeTable, *, begin: int, is_interleaved: bool, scale: float
    ) -> None:
        num_rows, num_heads, width = x_THP.shape
        self._library.moray_rotate(
            x_THP.data_ptr(), num_rows, num_heads, x_THP.stride(0), x_THP.stride(1), begin,
            table.cos_TP.shape[1], int(is_interleaved), table.cos_TP.data_ptr(), table.sin_TP.data_ptr(),
            width, scale, self._num_threads,
        )  # fmt: skip

    def store_rows(
        self, latent_TX: Tensor, key_TI: Tensor, norms: CacheNorms, table: RopeTable, cached: LayerCache
    ) -> None:
        """Norms, turns and writes."""
        layout = cached.layout
        shape = CacheShape(
            layout.latent,
            layout.rope,
            layout.index,
            int(layout.key_form == "int8"),
            norms.eps,
            INDEXER_NORM_EPS,
        )
        self._library.moray_cache_rows(
            shape, latent_TX.data_ptr(), latent_TX.stride(0), key_TI.data_ptr(), key_TI.stride(0),
            norms.latent_C.data_ptr(), norms.key_I.data_ptr(), norms.key_bias_I.data_ptr(),
            table.cos_TP.data_ptr(), table.sin_TP.data_ptr(), len(latent_TX),
            cached.rows_NW.data_ptr(), cached.rows_NW.stride(0), cached.append_T.data_ptr(),
        self._num_threads, )  # fmt: skip

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """The gate's choice."""
        num_rows, top_k = len(logits_TE), config.num_experts_per_tok
        ids_TK = torch.empty(num_rows, top_k, dtype=torch.int32)
        weights_TK = torch.empty(num_rows, top_k)
        shape = GateShape(
            config.n_routed_experts, config.n_group, config.topk_group, top_k,
            config.routed_scaling_factor, WEIGHT_FLOOR,
        )  # fmt: skip
        self._library.moray_choose_experts(
            shape, logits_TE.data_ptr(), bias_E.data_ptr(), num_rows, ids_TK.data_ptr(),
            weights_TK.data_ptr(), self._num_threads,
        )  # fmt: skip
        return ids_TK, weights_TK

    def attend_expanded(
        self, query_RHQ: Tensor, expand_HVC: HeadMatrix, cached: LayerCache, reads: Reads
    ) -> Tensor:
        """Causal attention over keys and values of every head."""
        query_RHQ = query_RHQ.contiguous()
        num_rows, num_heads, query_width = query_RHQ.shape
        layout, rows_NW, expand = cached.layout, cached.rows_NW, _native(expand_HVC, NativeMatrix)
        nope = query_width - layout.rope
        value = expand.num_columns - nope
        shape = ExpandedShape(num_heads, nope, layout.rope, value, layout.latent, rows_NW.stride(0))
        value_RHO = torch.empty(num_rows, num_heads, value)
        self._library.moray_attend_expanded(
            shape, expand.struct, query_RHQ.data_ptr(), num_rows, reads.first_position,
            rows_NW.data_ptr(), reads.context_S.data_ptr(), value_RHO.data_ptr(), self._num_threads,
        )  # fmt: skip
        return value_RHO

    def attend_absorbed(
        self, query_RHQ: Tensor, heads: AbsorbedHeads, cached: LayerCache, reads: Sequence[Reads]
    ) -> Tensor:
        """Attention over the latent itself."""
        query_RHQ = query_RHQ.contiguous()
        num_rows, num_heads, _ = query_RHQ.shape
        key, value = (_native(matrix, NativeMatrix) for matrix in (heads.key_HCN, heads.value_HOC))
        layout = cached.layout
        shape = AbsorbedShape(num_heads, layout.latent, layout.key_begin, cached.rows_NW.stride(0))
        lists = np.concatenate([read.row_lists[0] for read in reads])
        counts = np.concatenate([read.row_lists[1] for read in reads])
        value_RHO = torch.empty(num_rows, num_heads, value.num_columns)
        self._library.moray_attend_absorbed(
            shape, key.struct, value.struct, cached.rows_NW.data_ptr(), query_RHQ.data_ptr(), num_rows,
            lists.ctypes.data, counts.ctypes.data, value_RHO.data_ptr(), self._num_threads,
        )  # fmt: skip
        return value_RHO

    def index_scores(self, query_RJI: Tensor, head_RJ: Tensor, cached: LayerCache, reads: Reads) -> Tensor:
        """The indexer's scores."""
        query_RJI, head_RJ = query_RJI.contiguous(), head_RJ.contiguous()
        num_rows, num_heads, width = query_RJI.shape
        layout, rows_NW = cached.layout, cached.rows_NW
        shape = IndexerShape(num_heads, width, int(layout.key_form == "int8"), rows_NW.stride(0))
        lists, counts = reads.row_lists
        score_RS = torch.empty(num_rows, len(reads.context_S))
        self._library.moray_index_scores(
            shape, rows_NW.data_ptr() + layout.key_begin * _FLOAT_BYTES, query_RJI.data_ptr(),
            head_RJ.data_ptr(), num_rows, lists.ctypes.data, counts.ctypes.data,
            score_RS.data_ptr(), score_RS.stride(0), self._num_threads,
        )  # fmt: skip
        return score_RS

    def select_positions(self, score_RS: Tensor, *, first_position: int, num_selected: int) -> Tensor:
        """The best visible positions."""
        num_rows = len(score_RS)
        counts = np.arange(first_position + 1, first_position + num_rows + 1, dtype=np.int32)
        position_RU = torch.empty(num_rows, num_selected, dtype=torch.int64)
        self._library.moray_select_positions(
            score_RS.data_ptr(), num_rows, score_RS.stride(0), counts.ctypes.data, num_selected,
            position_RU.data_ptr(), self._num_threads,
        )  # fmt: skip
        return position_RU

    def gather_experts(self, experts: Mapping[int, Mlp]) -> NativeExperts:
        """With the table of their weights that the library takes."""
        return experts if isinstance(experts, NativeExperts) else NativeExperts(experts)

    def expert_sums(self, x_RD: Tensor, assignments: Assignments, experts: Mapping[int, Mlp]) -> Tensor:
        """All experts in one call."""
        gathered = self.gather_experts(experts)
        x_RD = x_RD.contiguous()
        row_A, expert_A = _int32(assignments.row_idx_A), _int32(assignments.expert_idx_A)
        weight_A = assignments.weights_A.contiguous()
        num_rows, num_assigned = len(x_RD), len(expert_A)
        sums_RD = torch.empty(x_RD.shape, dtype=torch.float64)
        wrong = self._library.moray_experts(
            gathered.gate_up_address, gathered.down_address, gathered.num_places, x_RD.data_ptr(), num_rows,
            x_RD.shape[1], expert_A.data_ptr(), row_A.data_ptr(), weight_A.data_ptr(), num_assigned,
            sums_RD.data_ptr(), self._num_threads,
        )  # fmt: skip
        if wrong < num_assigned:
            if (expert_idx := int(expert_A[wrong])) not in gathered:
                raise KeyError(expert_idx)
            raise IndexError(f"assignment {wrong} names row {int(row_A[wrong])} of {num_rows}")
        return sums_RD


def _native(packed: object, kind: type[_Packed]) -> _Packed:
    if not isinstance(packed, kind):
        raise TypeError(f"{type(packed).__name__} was packed by other kernels")
    return packed


def _int32(index_A: Tensor) -> Tensor:
    return index_A.to(torch.int32).contiguous()


def _rows(x: Tensor) -> Tensor:
    """The tensor, or a copy, with neighbours in a row beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
