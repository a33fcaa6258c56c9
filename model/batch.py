"""What one step of the model takes, and the three things that it asks of its caller: cache, experts, trace.

Letters: T tokens (rows of the batch), R rows of one span, D hidden, K top-k, U selected positions, S cached
positions, N rows of the cache, W cache row (`CacheLayout`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.cache_layout import CacheLayout


@dataclass(frozen=True)
class Span:
    """Rows [begin_row, end_row) of a batch: consecutive tokens of one sequence."""

    begin_row: int
    end_row: int
    context_tokens: int
    """Cached length of the sequence after this step; the span's first position is this minus its rows."""
    prompt_tokens: int | None = None
    """Leading positions of the sequence that are its client's prompt; None = all. It chooses the form of
    attention (model/attention.py), so it must be the same whenever the sequence is computed again."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch in this span, >= 1."""
        return self.end_row - self.begin_row

    @property
    def first_position(self) -> int:
        """Position of the span's first token in its sequence."""
        return self.context_tokens - self.num_rows


@dataclass(frozen=True)
class Batch:
    """Tokens of one step; spans cover all rows, in order, without overlap."""

    token_ids_T: Tensor
    """(T,) int64."""
    position_ids_T: Tensor
    """(T,) int64."""
    spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])


def make_batch(
    token_ids: Sequence[Sequence[int]],
    *,
    first_positions: Sequence[int],
    prompt_tokens: Sequence[int] | None = None,
) -> Batch:
    """The batch of some sequences' next tokens; prompt_tokens[i] is that of span i, None = all is prompt.

    Example: `make_batch([[5, 6], [7]], first_positions=[0, 9])` has positions 0, 1, 9 and the spans
    (0, 2, context 2) and (2, 3, context 10).
    """
    flat: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    prompts: Sequence[int | None] = prompt_tokens or [None] * len(token_ids)
    for ids, first, prompt in zip(token_ids, first_positions, prompts, strict=True):
        spans.append(Span(len(flat), len(flat) + len(ids), first + len(ids), prompt))
        flat.extend(ids)
        positions.extend(range(first, first + len(ids)))
    return Batch(
        token_ids_T=torch.tensor(flat, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        spans=tuple(spans),
    )


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's cache rows, and which of them belong to the batch."""

    layout: CacheLayout
    rows_NW: Tensor
    """(N, W) float32, rows of every sequence; written in place."""
    append_T: Tensor
    """(T,) int64: where the rows of the batch go."""
    context_S: tuple[Tensor, ...]
    """For each span (S,) int64: the rows of its sequence, those of this step too, in order of position."""
    on_stored: Callable[[], None] | None = None
    """Called by attention when the batch's rows are stored, before it reads any; None = nobody cares."""
    on_read: Callable[[Tensor], None] | None = None
    """Called by attention with indices of the rows whose latents it is about to read, int64 of any shape."""

    def append(self, rows_TW: Tensor) -> None:
        """Stores the batch's rows, (T, W)."""
        self.rows_NW[self.append_T] = rows_TW


class CacheView(Protocol):
    """The cache rows of the sequences of one batch."""

    def layer(self, layer_idx: int) -> LayerCache:
        """One layer's rows."""


class PendingRows(Protocol):
    """Rows that may still be under way."""

    def result(self) -> Tensor:
        """(T, D) float32; waits until they are there."""


@dataclass(frozen=True)
class ReadyRows:
    """Rows that are there."""

    rows_TD: Tensor

    def result(self) -> Tensor:
        """The rows."""
        return self.rows_TD


@dataclass(frozen=True)
class LaterRows:
    """Rows that are computed when they are asked for."""

    compute: Callable[[Tensor], Tensor]
    x_TD: Tensor

    def result(self) -> Tensor:
        """The rows."""
        return self.compute(self.x_TD)


class MoeStep(Protocol):
    """Starts the routed experts of a layer."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether others compute them: this process's threads are free meanwhile."""

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        """Their weighted sums.

        Args:
            layer_idx: MoE layer.
            x_TD: (T, D) float32.
            ids_TK: (T, K) int32 chosen experts, -1 = none.
            weights_TK: (T, K) float32.
        """


class Trace(Protocol):
    """Is told the model's discrete choices."""

    def on_gate(self, layer_idx: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """The experts of a layer: (T, K) int32, best first, and their weights (T, K) float32."""

    def on_index(self, layer_idx: int, span_idx: int, ids_RU: Tensor) -> None:
        """The positions that a span's rows attend to: (R, U) int32, U = min(index_topk, context_tokens).

        Ascending, padded with -1 at the end of rows that see fewer than U positions.
        """


class RowsView:
    """A `CacheView` of sequences whose rows have the same indices in every layer."""

    def __init__(
        self, layout: CacheLayout, rows_LNW: Tensor, batch: Batch, context_S: tuple[Tensor, ...]
    ) -> None:
        """Takes all rows, and for each span of the batch the indices of its sequence, (S,) int64."""
        self._layout = layout
        self._rows_LNW = rows_LNW
        self._context_S = context_S
        self._append_T = torch.cat(
            [ids[span.first_position :] for span, ids in zip(batch.spans, context_S, strict=True)]
        )

    def layer(self, layer_idx: int) -> LayerCache:
        """One layer's rows."""
        return LayerCache(
            layout=self._layout,
            rows_NW=self._rows_LNW[layer_idx],
            append_T=self._append_T,
            context_S=self._context_S,
        )


class DenseCache:
    """A plain `CacheView`: one buffer for all sequences, grown as needed; a position keeps its row.

    For tests and single-process comparison; `view` says which sequences the next batch belongs to.
    """

    def __init__(self, *, num_layers: int, layout: CacheLayout) -> None:
        self._layout = layout
        self._rows_LNW = torch.zeros(num_layers, 16, layout.width)
        self._num_used = 0
        self._ids: dict[int, Tensor] = {}
        """Sequence -> rows by position."""

    def view(self, batch: Batch, sequence_ids: Sequence[int] = (0,)) -> RowsView:
        """The view of one batch; sequence_ids[i] is the sequence of span i.

        Rows after a span's last position are forgotten: that is how rejected drafts are dropped.

        Raises:
            IndexError: a span begins behind the end of its sequence.
        """
        spans = zip(batch.spans, sequence_ids, strict=True)
        context_S = tuple(self._extend(sequence_id, span) for span, sequence_id in spans)
        return RowsView(self._layout, self._rows_LNW, batch, context_S)

    def _extend(self, sequence_id: int, span: Span) -> Tensor:
        ids = self._ids.get(sequence_id, torch.empty(0, dtype=torch.int64))
        if len(ids) < span.first_position:
            have = f"sequence {sequence_id} has {len(ids)} rows"
            raise IndexError(f"{have}, and the batch begins at position {span.first_position}")
        num_new = max(0, span.context_tokens - len(ids))
        ids = torch.cat((ids, torch.arange(self._num_used, self._num_used + num_new)))
        self._ids[sequence_id] = ids
        self._num_used += num_new
        if self._num_used > self._rows_LNW.shape[1]:
            grown = self._rows_LNW.new_zeros(len(self._rows_LNW), 2 * self._num_used, self._rows_LNW.shape[2])
            grown[:, : self._rows_LNW.shape[1]] = self._rows_LNW
            self._rows_LNW = grown
        return ids[: span.context_tokens]
