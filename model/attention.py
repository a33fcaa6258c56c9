"""Multi-head latent attention over cached rows, with the indexer's choice of what is read.

One function in two forms. Expanded: keys and values of every head are made from the latents again; a third of
the arithmetic, but all of it for each step, so it is for prompts. Absorbed: queries go to the latent and
read it as it lies in the cache; for generated tokens, and for rows that see more than index_topk positions
and read the indexer's selection. The forms differ in the last bits, so which one computes a token is decided
by its position and by whether it belongs to the client's prompt: never by chunk, batch or worker.

Letters: T tokens, R rows of one span, D hidden, Q query rank, H heads, N nope width, P rope width, O value
width per head, C latent, X = C + P, J indexer heads, I indexer width, W cache row, S cached positions,
U selected positions, V values of one row and head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import Batch, CacheView, LayerCache, Span, Trace
from model.config import ModelConfig
from model.kernels.base import Kernels, Reads
from model.online_bias import OnlineBias
from model.rope import RopeTable
from model.weights import AttentionWeights


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """How the rows of a span are computed: [begin, expanded), [expanded, dense), [dense, end)."""

    span_idx: int
    begin_row: int
    expanded_end: int
    """Prompt rows that see at most index_topk positions."""
    dense_end: int
    """Generated rows that do."""
    end_row: int
    """The others read a selection."""
    first_position: int

    def reads(self, cached: LayerCache, begin_row: int, end_row: int) -> Reads:
        """What some of its rows read."""
        return Reads(
            begin_row=begin_row,
            end_row=end_row,
            first_position=self.first_position + begin_row - self.begin_row,
            context_S=cached.context_S[self.span_idx],
        )

    def dense_reads(self, cached: LayerCache) -> Reads | None:
        """What its dense rows read; None = it has none."""
        if self.expanded_end == self.dense_end:
            return None
        return self.reads(cached, self.expanded_end, self.dense_end)


def plan_span(span: Span, span_idx: int, *, index_topk: int) -> SpanPlan:
    """The forms of a span's rows.

    Example: index_topk 8, a span of positions [5, 12) whose first 7 are prompt: rows of positions 5 and 6 are
    expanded, that of 7 is dense, those of 8 to 11 read a selection.
    """
    num_dense = min(max(index_topk - span.first_position, 0), span.num_rows)
    prompt_tokens = span.context_tokens if span.prompt_tokens is None else span.prompt_tokens
    num_expanded = min(max(prompt_tokens - span.first_position, 0), num_dense)
    return SpanPlan(
        span_idx=span_idx,
        begin_row=span.begin_row,
        expanded_end=span.begin_row + num_expanded,
        dense_end=span.begin_row + num_dense,
        end_row=span.end_row,
        first_position=span.first_position,
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the layers of one forward pass share."""

    config: ModelConfig
    kernels: Kernels
    batch: Batch
    plans: tuple[SpanPlan, ...]
    """One a span."""
    dense_reads: tuple[Reads | None, ...]
    """One a span: what its dense rows read in every layer; None = it has none."""
    table: RopeTable
    """Rotary table of the batch's positions."""
    cache: CacheView
    trace: Trace | None
    online_bias: OnlineBias | None = None
    """Moves the gate's choices; None = nothing does."""


def attention(x_TD: Tensor, weights: AttentionWeights, step: Step, *, layer_idx: int) -> Tensor:
    """The attention output of normed rows (T, D), their cache rows stored on the way: (T, D) float32."""
    config, kernels = step.config, step.kernels
    cached = step.cache.layer(layer_idx)
    q_TQ, latent_TX, key_TI = weights.inputs_FD(x_TD)
    q_TQ = kernels.rms_norm(q_TQ, weights.query_norm_Q, eps=config.rms_norm_eps)
    kernels.store_rows(latent_TX, key_TI, weights.cache_norms, step.table, cached)
    if cached.on_stored is not None:
        cached.on_stored()
    query_THQ = weights.query_b_HQ(q_TQ).view(-1, config.num_attention_heads, config.qk_head_dim)
    query_THQ = kernels.rotate_queries(query_THQ, step.table, config)
    reads = _absorbed_reads(x_TD, q_TQ, weights, step, cached=cached, layer_idx=layer_idx)
    if sum(read.num_rows for read in reads) == step.batch.num_rows:
        value_THO = kernels.attend_absorbed(query_THQ, weights.absorbed, cached, reads)
    else:
        value_THO = query_THQ.new_empty(*query_THQ.shape[:2], config.v_head_dim)
        for plan in step.plans:
            if plan.begin_row < plan.expanded_end:
                rows = slice(plan.begin_row, plan.expanded_end)
                value_THO[rows] = _expanded(query_THQ[rows], weights, step, cached, plan)
        if reads:
            rows_T = torch.cat([torch.arange(read.begin_row, read.end_row) for read in reads])
            rows_T = rows_T.to(query_THQ.device)
            value_THO[rows_T] = kernels.attend_absorbed(query_THQ[rows_T], weights.absorbed, cached, reads)
    return weights.output_DHO(value_THO.flatten(1))


def _expanded(
    query_RHQ: Tensor, weights: AttentionWeights, step: Step, cached: LayerCache, plan: SpanPlan
) -> Tensor:
    """(R, H, O) of a span's expanded rows."""
    reads = plan.reads(cached, plan.begin_row, plan.expanded_end)
    return step.kernels.attend_expanded(query_RHQ, weights.expand_HVC, cached, reads)


def _absorbed_reads(
    x_TD: Tensor,
    q_TQ: Tensor,
    weights: AttentionWeights,
    step: Step,
    *,
    cached: LayerCache,
    layer_idx: int,
) -> list[Reads]:
    """What the rows that are not expanded read; tells the trace of every row."""
    found: list[Reads] = []
    for plan in step.plans:
        if cached.on_read is not None and plan.begin_row < plan.dense_end:
            cached.on_read(cached.context_S[plan.span_idx])
        dense = step.dense_reads[plan.span_idx]
        if dense is not None:
            found.append(dense)
        position_RU = None
        if plan.dense_end < plan.end_row:
            sparse = plan.reads(cached, plan.dense_end, plan.end_row)
            position_RU = _select(x_TD, q_TQ, weights, step, cached=cached, reads=sparse)
            selected_RU = sparse.context_S[position_RU]
            if cached.on_read is not None:
                cached.on_read(selected_RU)
            found.append(replace(sparse, selected_RU=selected_RU))
        if step.trace is not None:
            num_selected = step.config.index_topk
            step.trace.on_index(layer_idx, plan.span_idx, _listed(plan, position_RU, num_selected))
    return found


def _select(
    x_TD: Tensor, q_TQ: Tensor, weights: AttentionWeights, step: Step, *, cached: LayerCache, reads: Reads
) -> Tensor:
    """The positions that rows read: (R, U) int64, ascending."""
    config, kernels = step.config, step.kernels
    rows = slice(reads.begin_row, reads.end_row)
    query_RJI = weights.indexer.query_JIQ(q_TQ[rows]).view(-1, config.index_n_heads, config.index_head_dim)
    table = RopeTable(cos_TP=step.table.cos_TP[rows], sin_TP=step.table.sin_TP[rows])
    scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
    head_RJ = weights.indexer.head_JD(x_TD[rows]) * scale
    query_RJI = kernels.rotate_index_queries(query_RJI, table)
    score_RS = kernels.index_scores(query_RJI, head_RJ, cached, reads)
    return kernels.select_positions(
        score_RS, first_position=reads.first_position, num_selected=config.index_topk
    )


def _listed(plan: SpanPlan, position_RU: Tensor | None, num_selected: int) -> Tensor:
    """(R, U) int32: what each row of a span reads, ascending, -1 padded."""
    num_rows = plan.end_row - plan.begin_row
    column_U = torch.arange(min(num_selected, plan.first_position + num_rows))
    last_R = torch.arange(plan.first_position, plan.first_position + plan.dense_end - plan.begin_row)
    dense_RU = torch.where(column_U <= last_R[:, None], column_U, -1)
    parts = [dense_RU] if position_RU is None else [dense_RU, position_RU.cpu()]
    return torch.cat(parts).to(torch.int32)
