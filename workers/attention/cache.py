"""The paged latent cache: one row a token and layer, holding latent, rope key and indexer key.

L layers (MTP included), P pages, S tokens of a sequence, T rows of a batch, W row width
(`CacheLayout`). A token's row has the flat index page * page_tokens + offset in every layer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, RowsView
from model.cache_layout import CacheLayout


class PagedCache:
    """The tensors behind the pages; written and read by the engine thread only."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        layout: CacheLayout,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_tokens = page_tokens
        self.num_layers = num_layers
        self.width = layout.width
        self._layout = layout
        self._rows_LNW = torch.zeros(num_layers, num_pages * page_tokens, layout.width, device=device)

    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self._rows_LNW.numel() * self._rows_LNW.element_size()

    def flat_rows(self, pages: Sequence[int], *, begin: int, end: int) -> Tensor:
        """Flat indices of the tokens [begin, end) of a sequence that owns `pages`: (end - begin,) int64."""
        first_page = begin // self.page_tokens
        owned = np.asarray(pages[first_page : -(-end // self.page_tokens)], dtype=np.int64)
        rows = (owned[:, None] * self.page_tokens + np.arange(self.page_tokens)).reshape(-1)
        skipped = first_page * self.page_tokens
        return torch.from_numpy(rows[begin - skipped : end - skipped]).to(self._rows_LNW.device)

    def write(self, layer_idx: int, flat_T: Tensor, rows_TW: Tensor) -> None:
        """Puts rows at flat indices of one layer."""
        self._rows_LNW[layer_idx, flat_T] = rows_TW.to(self._rows_LNW.device)

    def read(self, layer_idx: int, flat_S: Tensor) -> Tensor:
        """A copy of the rows at flat indices of one layer: (S, W) float32."""
        return self._rows_LNW[layer_idx].index_select(0, flat_S)

    def view(self, batch: Batch, pages: Sequence[Sequence[int]]) -> RowsView:
        """The CacheView of a batch; pages[i] belong to the sequence of span i."""
        context_S = tuple(
            self.flat_rows(owned, begin=0, end=span.context_tokens)
            for span, owned in zip(batch.spans, pages, strict=True)
        )
        return RowsView(self._layout, self._rows_LNW, batch, context_S)
