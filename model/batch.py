"""What one step of the model takes, and the three things that it asks of its caller: cache, experts, trace.

Letters: T tokens (rows of the batch), R rows of one span, D hidden, K top-k, U selected positions, S cached
positions, W cache row (`cache_width`): latent C, then rope key P, then indexer key I.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Rows [begin_row, end_row) of a batch: consecutive tokens of one sequence."""

    begin_row: int
    end_row: int
    context_tokens: int
    """Cached length of the sequence after this step; the span's first position is this minus its rows."""

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


def make_batch(token_ids: Sequence[Sequence[int]], *, first_positions: Sequence[int]) -> Batch:
    """The batch of some sequences' next tokens.

    Example: `make_batch([[5, 6], [7]], first_positions=[0, 9])` has positions 0, 1, 9 and the spans
    (0, 2, context 2) and (2, 3, context 10).
    """
    flat: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    for ids, first in zip(token_ids, first_positions, strict=True):
        spans.append(Span(len(flat), len(flat) + len(ids), first + len(ids)))
        flat.extend(ids)
        positions.extend(range(first, first + len(ids)))
    return Batch(
        token_ids_T=torch.tensor(flat, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        spans=tuple(spans),
    )


class CacheView(Protocol):
    """The cache rows of the sequences of one batch."""

    def append(self, layer_idx: int, rows_TW: Tensor) -> None:
        """Stores the batch's rows of one layer, (T, W) float32, at the end of each span's sequence."""

    def context(self, layer_idx: int, span_idx: int) -> Tensor:
        """All rows of a span's sequence, those just appended too: (S, W) float32, S = context_tokens."""


class PendingRows(Protocol):
    """Routed experts' output that may still be under way."""

    def result(self) -> Tensor:
        """(T, D) float32; waits until it is there."""


MoeStep = Callable[[int, Tensor, Tensor, Tensor], PendingRows]
"""Starts the routed experts of a layer: (layer_idx, x_TD float32, ids_TK int32, weights_TK float32)."""


class Trace(Protocol):
    """Is told the model's discrete choices."""

    def on_gate(self, layer_idx: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """The experts of a layer: (T, K) int32, best first, and their weights (T, K) float32."""

    def on_index(self, layer_idx: int, span_idx: int, ids_RU: Tensor) -> None:
        """The positions that a span's rows attend to: (R, U) int32, U = min(index_topk, context_tokens).

        Ascending, padded with -1 at the end of rows that see fewer than U positions.
        """


class DenseCache:
    """A plain `CacheView`: one buffer per layer and sequence, grown as needed.

    For tests and single-process comparison; `view` says which sequences the next batch belongs to.
    """

    def __init__(self, *, num_layers: int, width: int) -> None:
        self._width = width
        self._rows_SW: list[dict[int, Tensor]] = [{} for _ in range(num_layers)]

    def view(self, batch: Batch, sequence_ids: Sequence[int] = (0,)) -> "DenseCacheView":
        """The view of one batch; sequence_ids[i] is the sequence of span i.

        A sequence longer than its span's first position is cut back: that is how rejected drafts are dropped.
        """
        return DenseCacheView(self, batch, tuple(sequence_ids))

    def write(self, layer_idx: int, sequence_id: int, first_position: int, rows_RW: Tensor) -> None:
        """Puts rows at [first_position, ...) of a sequence and forgets what came after."""
        held = self._rows_SW[layer_idx].get(sequence_id, rows_RW.new_empty((0, self._width)))
        if held.shape[0] < first_position:
            have = f"sequence {sequence_id} has {held.shape[0]} rows in layer {layer_idx}"
            raise IndexError(f"{have}, and the batch begins at position {first_position}")
        self._rows_SW[layer_idx][sequence_id] = torch.cat((held[:first_position], rows_RW))

    def read(self, layer_idx: int, sequence_id: int) -> Tensor:
        """All rows of a sequence: (S, W)."""
        return self._rows_SW[layer_idx][sequence_id]


class DenseCacheView:
    """One batch's view of a `DenseCache`."""

    def __init__(self, cache: DenseCache, batch: Batch, sequence_ids: tuple[int, ...]) -> None:
        self._cache = cache
        self._placed = tuple(zip(batch.spans, sequence_ids, strict=True))

    def append(self, layer_idx: int, rows_TW: Tensor) -> None:
        """Stores each span's rows in its sequence."""
        for span, sequence_id in self._placed:
            rows_RW = rows_TW[span.begin_row : span.end_row]
            self._cache.write(layer_idx, sequence_id, span.first_position, rows_RW)

    def context(self, layer_idx: int, span_idx: int) -> Tensor:
        """All rows of a span's sequence: (S, W)."""
        return self._cache.read(layer_idx, self._placed[span_idx][1])
