"""Sparse attention's indexer: which cached positions a token attends to.

The Hadamard rotation of the published code is left out: it turns queries and keys alike, so it changes only
the error of an FP8 rounding that does not happen here.

Letters: T tokens, R rows of one span, D hidden, Q query rank, J indexer heads, I indexer width, S cached
positions, U selected positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import INDEXER_NORM_EPS, ModelConfig
from model.linear import linear
from model.norms import layer_norm
from model.rope import RopeTable, rotate_half_split
from model.weights import IndexerWeights


@dataclass(frozen=True, kw_only=True)
class IndexerQueries:
    """What tokens ask of the cached keys."""

    query_TJI: Tensor
    """(T, J, I) float32."""
    head_TJ: Tensor
    """(T, J) float32: weight of each head, both scale factors included."""

    def rows(self, begin_row: int, end_row: int) -> "IndexerQueries":
        """Those of rows [begin_row, end_row)."""
        part = slice(begin_row, end_row)
        return IndexerQueries(query_TJI=self.query_TJI[part], head_TJ=self.head_TJ[part])


def indexer_keys(x_TD: Tensor, weights: IndexerWeights, table: RopeTable) -> Tensor:
    """The key that each token leaves in the cache: (T, I) float32, layout [rope | nope]."""
    key_TI = linear(x_TD, weights.key_ID)
    key_TI = layer_norm(key_TI, weights.key_norm_I, weights.key_bias_I, eps=INDEXER_NORM_EPS)
    return _rotate_front(key_TI[:, None], table)[:, 0]


def indexer_queries(
    x_TD: Tensor, q_TQ: Tensor, weights: IndexerWeights, table: RopeTable, config: ModelConfig
) -> IndexerQueries:
    """Queries and head weights of tokens; q_TQ is the query latent after its norm."""
    query_TJI = linear(q_TQ, weights.query_JIQ).view(-1, config.index_n_heads, config.index_head_dim)
    scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
    head_TJ = linear(x_TD, weights.head_JD) * scale
    return IndexerQueries(query_TJI=_rotate_front(query_TJI, table), head_TJ=head_TJ)


def index_scores(queries: IndexerQueries, key_SI: Tensor) -> Tensor:
    """`sum_j relu(q_j . k_s) * w_j` of R rows and S keys: (R, S) float32, no causal mask."""
    num_rows, num_heads, _ = queries.query_TJI.shape
    score_RJS = linear(queries.query_TJI.flatten(0, 1), key_SI).view(num_rows, num_heads, -1)
    score_RS: Tensor = score_RJS.relu_().mul_(queries.head_TJ[:, :, None]).sum(1)
    return score_RS


def select_positions(score_RS: Tensor, *, first_position: int, num_selected: int) -> Tensor:
    """The best visible positions of rows that see more than num_selected; ties go to the earlier position.

    Example: scores (3, 1, 2, 2, 9) of a row at position 3, two selected: (0, 2); position 4 is not visible.

    Args:
        score_RS: (R, S) float32, row r at position first_position + r; positions after it are ignored.
        first_position: at least num_selected.
        num_selected: U.

    Returns:
        (R, U) int64, ascending.
    """
    num_rows, num_cached = score_RS.shape
    columns = torch.arange(num_cached, device=score_RS.device)
    rows = torch.arange(first_position, first_position + num_rows, device=score_RS.device)
    score_RS = score_RS.masked_fill(columns > rows[:, None], -math.inf)
    last_kept = score_RS.topk(num_selected, dim=-1).values[:, -1:]
    above, tied = score_RS > last_kept, score_RS == last_kept
    num_tied = num_selected - above.sum(-1, keepdim=True)
    kept = above | (tied & (tied.cumsum(-1) <= num_tied))
    return kept.nonzero()[:, 1].view(num_rows, num_selected)


def _rotate_front(x_TJI: Tensor, table: RopeTable) -> Tensor:
    """Half-split rotation of the first P of I values: the indexer's rope part stands in front."""
    width = 2 * table.cos_TP.shape[-1]
    return torch.cat((rotate_half_split(x_TJI[..., :width], table), x_TJI[..., width:]), dim=-1)
