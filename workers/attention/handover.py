"""Cache rows leave a prefill as soon as their layer has stored them, while later layers are computed.

The model asks a `CacheView` for one layer after the other; when it asks for layer i, the rows of the layers
before are stored. So nothing in the model knows of it, and a view of sequences that keep their rows costs
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from model.batch import CacheView, LayerCache
from workers.attention.cache import PagedCache
from workers.attention.types import CacheRows, SequenceState, Source


@dataclass(frozen=True)
class HandedRows:
    """Rows [begin, end) of a sequence that another worker wants."""

    sequence: SequenceState
    begin: int
    end: int


class HandoverView:
    """A `CacheView` that tells of every layer once, when its rows of the batch are stored."""

    def __init__(self, view: CacheView, on_stored: Callable[[int], None]) -> None:
        self._view = view
        self._on_stored = on_stored
        self._num_told = 0

    def layer(self, layer_idx: int) -> LayerCache:
        """One layer's rows; those of the layers before it are complete."""
        self.tell_up_to(layer_idx)
        return self._view.layer(layer_idx)

    def tell_up_to(self, num_layers: int) -> None:
        """Tells of the layers [0, num_layers) that were not told of yet."""
        while self._num_told < num_layers:
            self._num_told += 1
            self._on_stored(self._num_told - 1)


def wanted_rows(sequence: SequenceState, begin: int, end: int) -> list[HandedRows]:
    """What of its rows [begin, end) another worker wants: one item, or none."""
    begin = max(begin, sequence.spec.first_wanted_row)
    is_wanted = sequence.spec.source is Source.PREFILL_ONLY and begin < end
    return [HandedRows(sequence, begin, end)] if is_wanted else []


def hand_over(cache: PagedCache, wanted: list[HandedRows], layer_idx: int) -> None:
    """Gives a layer's rows to the sinks of their sequences, as copies."""
    for rows in wanted:
        flat_T = cache.flat_rows(rows.sequence.pages, begin=rows.begin, end=rows.end)
        rows_TB = cache.read(layer_idx, flat_T).cpu().numpy()
        rows.sequence.sink(CacheRows(layer_idx, rows.begin, rows_TB))
