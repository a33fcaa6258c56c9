"""Multi-head latent attention over cached rows, absorbed: keys and values stay in the latent.

One code path for prefill chunks and decode. What a row computes depends on its own position only: a row
that sees at most index_topk positions attends to all of them, a later one to the index_topk that the indexer
picks, gathered in ascending order. So neither the chunk nor the batch that a row comes in changes its bits.

Letters: T tokens, R rows of one span, D hidden, Q query rank, H heads, N nope width, P rope width, O value
width per head, C latent, X = C + P, I indexer width, W = X + I, S cached positions, U selected positions,
M = rows * heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch, CacheView, Span, Trace
from model.config import ModelConfig
from model.indexer import IndexerQueries, index_scores, indexer_keys, indexer_queries, select_positions
from model.linear import head_linear, linear
from model.norms import rms_norm
from model.rope import RopeTable, rotate_interleaved
from model.weights import AttentionWeights

BLOCK_VALUES = 4 * 1024 * 1024
"""Float32 values in attention's largest temporary (16 MiB): query rows are taken in blocks to respect it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the layers of one forward pass share."""

    config: ModelConfig
    batch: Batch
    table: RopeTable
    """Rotary table of the batch's positions."""
    cache: CacheView
    trace: Trace | None


def attention(x_TD: Tensor, weights: AttentionWeights, step: Step, *, layer_idx: int) -> Tensor:
    """The attention output of normed rows (T, D), their cache rows appended on the way: (T, D) float32."""
    config = step.config
    q_TQ = rms_norm(linear(x_TD, weights.query_a_QD), weights.query_norm_Q, eps=config.rms_norm_eps)
    step.cache.append(layer_idx, _cache_rows(x_TD, weights, step))
    query_THX = _absorbed_queries(q_TQ, weights, step)
    index_queries = indexer_queries(x_TD, q_TQ, weights.indexer, step.table, config)
    spans = []
    for span_idx, span in enumerate(step.batch.spans):
        rows = slice(span.begin_row, span.end_row)
        context_SW = step.cache.context(layer_idx, span_idx)
        attend = _SpanAttention(config, span, context_SW, index_queries.rows(span.begin_row, span.end_row))
        spans.append(attend(query_THX[rows]))
        if step.trace is not None:
            step.trace.on_index(layer_idx, span_idx, attend.selected_positions())
    value_THO = head_linear(torch.cat(spans), weights.value_HCO)
    return linear(value_THO.flatten(1), weights.output_DHO)


def _cache_rows(x_TD: Tensor, weights: AttentionWeights, step: Step) -> Tensor:
    """(T, W): latent after its norm, rotated rope key, indexer key."""
    config = step.config
    latent_TX = linear(x_TD, weights.latent_CD)
    latent_TC = rms_norm(latent_TX[:, : config.kv_lora_rank], weights.latent_norm_C, eps=config.rms_norm_eps)
    rope_TP = rotate_interleaved(latent_TX[:, None, config.kv_lora_rank :], step.table)[:, 0]
    return torch.cat((latent_TC, rope_TP, indexer_keys(x_TD, weights.indexer, step.table)), dim=-1)


def _absorbed_queries(q_TQ: Tensor, weights: AttentionWeights, step: Step) -> Tensor:
    """(T, H, X): queries brought into the latent space, rope part behind, softmax scale included."""
    config = step.config
    query = linear(q_TQ, weights.query_b_HQ).view(-1, config.num_attention_heads, config.qk_head_dim)
    nope_THN, rope_THP = query.tensor_split((config.qk_nope_head_dim,), dim=-1)
    latent_THC = head_linear(nope_THN, weights.key_HNC)
    return torch.cat((latent_THC, rotate_interleaved(rope_THP, step.table)), dim=-1) * config.softmax_scale


class _SpanAttention:
    """Attention of one span's rows: the first `num_dense` see all before them, the others a selection."""

    def __init__(
        self, config: ModelConfig, span: Span, context_SW: Tensor, index_queries: IndexerQueries
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self._latent_width = config.kv_lora_rank
        self._num_selected = config.index_topk
        self._first_position = span.first_position
        self._num_rows = span.num_rows
        self._num_dense = min(max(config.index_topk - span.first_position, 0), span.num_rows)
        self._key_SX, self._index_key_SI = context_SW[:, :width], context_SW[:, width:]
        self._index_queries = index_queries
        self._selected: list[Tensor] = []

    def __call__(self, query_RHX: Tensor) -> Tensor:
        """(R, H, C): the latent that each head reads."""
        dense_values = query_RHX.shape[1] * min(self._num_selected, self._key_SX.shape[0])
        parts = [
            self._attend_all(query_RHX[begin:end], begin)
            for begin, end in self._blocks(0, self._num_dense, dense_values)
        ]
        sparse_values = max(
            self._num_selected * self._key_SX.shape[1],
            self._index_queries.head_TJ.shape[1] * self._key_SX.shape[0],
        )
        parts += [
            self._attend_selected(query_RHX[begin:end], begin)
            for begin, end in self._blocks(self._num_dense, self._num_rows, sparse_values)
        ]
        return torch.cat(parts)

    def selected_positions(self) -> Tensor:
        """(R, U) int32: what each row attended to, ascending, -1 padded; known once the span was computed."""
        num_listed = min(self._num_selected, self._first_position + self._num_rows)
        column_U = torch.arange(num_listed)
        last_R = torch.arange(self._first_position, self._first_position + self._num_dense)
        dense_RU = torch.where(column_U <= last_R[:, None], column_U, -1)
        return torch.cat((dense_RU, *(ids.cpu() for ids in self._selected))).to(torch.int32)

    def _blocks(self, begin_row: int, end_row: int, values_per_row: int) -> list[tuple[int, int]]:
        """Row ranges whose largest temporary stays within BLOCK_VALUES (one row at least)."""
        num_rows = max(1, BLOCK_VALUES // values_per_row)
        return [(begin, min(begin + num_rows, end_row)) for begin in range(begin_row, end_row, num_rows)]

    def _attend_all(self, query_RHX: Tensor, begin_row: int) -> Tensor:
        """Causal attention of rows that see at most index_topk positions."""
        num_rows, num_heads, _ = query_RHX.shape
        first = self._first_position + begin_row
        key_SX = self._key_SX[: first + num_rows]
        score_MS = linear(query_RHX.flatten(0, 1), key_SX)
        column_S = torch.arange(first + num_rows, device=score_MS.device)
        hidden_RS = column_S > column_S[first:, None]
        score_MS.view(num_rows, num_heads, -1).masked_fill_(hidden_RS[:, None], -math.inf)
        share_MS = score_MS.sub_(score_MS.amax(-1, keepdim=True)).exp_()
        # Not Tensor.sum: it would add in another order for another context length.
        total_M = linear(share_MS, share_MS.new_ones((2, share_MS.shape[1])))[:, :1]
        latent_MC = linear(share_MS, key_SX[:, : self._latent_width].t())
        return (latent_MC / total_M).view(num_rows, num_heads, -1)

    def _attend_selected(self, query_RHX: Tensor, begin_row: int) -> Tensor:
        """Attention of rows that see more than index_topk positions, each over its own selection."""
        num_rows = query_RHX.shape[0]
        first = self._first_position + begin_row
        queries = self._index_queries.rows(begin_row, begin_row + num_rows)
        score_RS = index_scores(queries, self._index_key_SI[: first + num_rows])
        ids_RU = select_positions(score_RS, first_position=first, num_selected=self._num_selected)
        self._selected.append(ids_RU)
        key_RUX = self._key_SX[ids_RU]
        share_RHU = torch.bmm(query_RHX, key_RUX.transpose(1, 2)).softmax(-1)
        return torch.bmm(share_RHU, key_RUX[:, :, : self._latent_width])
