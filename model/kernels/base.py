"""What the model asks of the machine: one interface, with a plain torch and a native implementation.

Letters: T tokens, R rows, D hidden, H heads, N nope width, P rope width, O value width per head, C latent,
X = C + P, J indexer heads, I indexer width, E logical experts, K top-k, S cached positions, U selected
positions, N rows of the cache where it stands for the cache, W cache row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model.batch import LayerCache
from model.config import ModelConfig
from model.matrix import HeadMatrix, JoinedMatrix, Matrix, Mlp, StoredMatrix
from model.precision import Form
from model.rope import RopeTable

_ID_BYTES = 8
WEIGHT_FLOOR = 1e-20
"""Added to the sum that gate weights are divided by: sigmoids that all underflow give weight 0, not NaN."""


class Assignments(NamedTuple):
    """Which row goes to which expert, and with what weight; any order, a row any number of times."""

    row_idx_A: Tensor
    """(A,) int64 or int32, row of x_RD."""
    expert_idx_A: Tensor
    """(A,) int64 or int32, logical expert."""
    weights_A: Tensor
    """(A,) float32."""

    @classmethod
    def from_choices(cls, ids_TK: Tensor, weights_TK: Tensor) -> "Assignments":
        """The assignments of a gate's choices; id -1 = none.

        Example: ids ((4, 7), (7, -1)) give rows (0, 0, 1) and experts (4, 7, 7).
        """
        is_chosen_TK = ids_TK >= 0
        row_idx_A = is_chosen_TK.nonzero()[:, 0]
        return cls(row_idx_A=row_idx_A, expert_idx_A=ids_TK[is_chosen_TK], weights_A=weights_TK[is_chosen_TK])


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What some rows of the batch read of the cache: rows [begin_row, end_row), consecutive tokens."""

    begin_row: int
    end_row: int
    first_position: int
    """Position of the first row in its sequence."""
    context_S: Tensor
    """(S,) int64: cache rows of the sequence, by position; row r sees those up to its own position."""
    selected_RU: Tensor | None = None
    """(R, U) int64: cache rows that each row reads instead, by ascending position."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.end_row - self.begin_row

    @cached_property
    def row_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """For each row the address of its list of cache rows, and its length; every layer asks again."""
        row_idx = np.arange(self.num_rows)
        if self.selected_RU is None:
            addresses = np.full(self.num_rows, self.context_S.data_ptr(), dtype=np.int64)
            return addresses, (row_idx + (self.first_position + 1)).astype(np.int32)
        num_selected = self.selected_RU.shape[1]
        addresses = self.selected_RU.data_ptr() + row_idx * (self.selected_RU.stride(0) * _ID_BYTES)
        return addresses, np.full(self.num_rows, num_selected, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class CacheNorms:
    """The norms between the projections and the cache."""

    latent_C: Tensor
    """kv_a_layernorm: (C,)."""
    key_I: Tensor
    """The indexer's k_norm.weight: (I,)."""
    key_bias_I: Tensor
    """The indexer's k_norm.bias: (I,)."""
    eps: float
    """rms_norm_eps; the indexer's own is fixed."""


@dataclass(frozen=True, kw_only=True)
class AbsorbedHeads:
    """kv_b_proj as absorbed attention takes it."""

    key_HCN: HeadMatrix
    """Its key half, transposed: (H, C, N)."""
    value_HOC: HeadMatrix
    """Its value half: (H, O, C)."""


class Kernels(Protocol):
    """Every operator of a step but the ones that torch does as well."""

    name: str
    """For logs: torch, avx512, avx2, plain."""

    def start(self) -> None:
        """Called once by the thread that will compute, when the weights are loaded."""

    def pack(self, stored: StoredMatrix, form: Form) -> Matrix:
        """A matrix held in a form."""

    def pack_joined(self, stored: Sequence[StoredMatrix], forms: Sequence[Form]) -> JoinedMatrix:
        """Matrices of the same rows, each held in its form."""

    def pack_heads(self, weights_HFD: Tensor, form: Form) -> HeadMatrix:
        """One matrix a head, from float32."""

    def pack_mlp(self, gate: StoredMatrix, up: StoredMatrix, down: StoredMatrix, form: Form) -> Mlp:
        """A SwiGLU of (F, D), (F, D) and (D, F); what `expert_sums` takes as an expert."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`: (T, D)."""

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """Adds delta to x in place and returns the norm of the sum: (T, D)."""

    def rotate_queries(self, query_THQ: Tensor, table: RopeTable, config: ModelConfig) -> Tensor:
        """Queries (T, H, N + P) with their rope part turned, times the softmax scale; may write in place."""

    def rotate_index_queries(self, query_TJI: Tensor, table: RopeTable) -> Tensor:
        """The indexer's queries (T, J, I) with their rope part, in front, turned; may write in place."""

    def store_rows(
        self, latent_TX: Tensor, key_TI: Tensor, norms: CacheNorms, table: RopeTable, cached: LayerCache
    ) -> None:
        """Writes the batch's cache rows: normed latent, turned rope key, normed and turned indexer key.

        Args:
            latent_TX: (T, C + P), kv_a_proj's output.
            key_TI: (T, I), the indexer's wk.
            norms: what they pass.
            table: rotary table of the batch.
            cached: the layer's rows.
        """

    def choose_experts(self, logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """Top-k experts by biased score within the best groups, weighted by unbiased score (noaux_tc).

        Example: scores (0.9, 0.1 | 0.6, 0.5), no bias, one of two groups kept, top 1: the groups' two best
        sum to 1.0 and 1.1, so expert 2 is chosen although 0 scores highest; its weight is
        routed_scaling_factor.

        Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; dropped groups count as -inf, because a biased
        score can be negative.

        Args:
            logits_TE: (T, E) float32, the gate's product; scores are its sigmoids.
            bias_E: (E,) float32, e_score_correction_bias: moves the choice, never the weights.
            config: n_group, topk_group, num_experts_per_tok, routed_scaling_factor.

        Returns:
            ids_TK: (T, K) int32, by descending biased score.
            weights_TK: (T, K) float32, each row sums to routed_scaling_factor.
        """

    def attend_expanded(
        self, query_RHQ: Tensor, expand_HVC: HeadMatrix, cached: LayerCache, reads: Reads
    ) -> Tensor:
        """Causal attention over the keys and values of every head, made of the cached latents.

        Args:
            query_RHQ: (R, H, N + P), turned and scaled.
            expand_HVC: for each head (N + O, C): nope key and value of a latent.
            cached: the layer's rows; their rope key is the same for all heads.
            reads: what the rows read; no selection.

        Returns:
            (R, H, O) float32.
        """

    def attend_absorbed(
        self, query_RHQ: Tensor, heads: AbsorbedHeads, cached: LayerCache, reads: Sequence[Reads]
    ) -> Tensor:
        """Attention over the latent itself: (R, H, O) float32, the rows of all `reads` one behind another.

        Args:
            query_RHQ: (R, H, N + P), turned and scaled.
            heads: what brings a query's nope part to the latent, and the latent to values.
            cached: the layer's rows.
            reads: what each run of rows reads.
        """

    def index_scores(self, query_RJI: Tensor, head_RJ: Tensor, cached: LayerCache, reads: Reads) -> Tensor:
        """`sum_j relu(q_j . k_s) * w_j`: (R, S) float32, undefined at positions that a row does not see.

        Args:
            query_RJI: (R, J, I), turned.
            head_RJ: (R, J), scaled.
            cached: the layer's rows; the indexer's key stands last.
            reads: which rows, and their context; consecutive positions.
        """

    def select_positions(self, score_RS: Tensor, *, first_position: int, num_selected: int) -> Tensor:
        """The best visible positions of rows that see more than num_selected; of equals the earlier.

        Example: scores (3, 1, 2, 2, 9) of a row at position 3, two selected: (0, 2); position 4 is not
        visible.

        Args:
            score_RS: (R, S) float32, row r at position first_position + r; positions after it are ignored.
            first_position: at least num_selected.
            num_selected: U.

        Returns:
            (R, U) int64, ascending.
        """

    def gather_experts(self, experts: Mapping[int, Mlp]) -> Mapping[int, Mlp]:
        """The same experts of one layer, made ready once for an `expert_sums` of every step."""

    def expert_sums(self, x_RD: Tensor, assignments: Assignments, experts: Mapping[int, Mlp]) -> Tensor:
        """Each row's weighted sum over its experts: (R, D) float64, zeros for a row with none.

        Raises:
            KeyError: an assignment names an expert that is not in `experts`.
            IndexError: or a row that is not in x.
        """
