"""The paged latent cache: one row a token and layer, holding latent, rope key and indexer key.

L layers (MTP included), P pages, S tokens of a sequence, T rows of a batch, W row width
(`ModelConfig.cache_width`). A token's row has the flat index page * page_tokens + offset in every layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch


class PagedCache:
    """The tensors behind the pages; written and read by the engine thread only."""

    def __init__(
        self, *, num_layers: int, num_pages: int, page_tokens: int, width: int, device: str = "cpu"
    ) -> None:
        self.page_tokens = page_tokens
        self.num_layers = num_layers
        self.width = width
        self._rows_LNW = torch.zeros(num_layers, num_pages * page_tokens, width, device=device)

    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self._rows_LNW.numel() * self._rows_LNW.element_size()

    def flat_rows(self, pages: Sequence[int], *, begin: int, end: int) -> Tensor:
        """Flat indices of the tokens [begin, end) of a sequence that owns `pages`: (end - begin,) int64."""
        token_S = torch.arange(begin, end)
        page_S = torch.tensor(pages, dtype=torch.int64)[token_S // self.page_tokens]
        return (page_S * self.page_tokens + token_S % self.page_tokens).to(self._rows_LNW.device)

    def write(self, layer_idx: int, flat_T: Tensor, rows_TW: Tensor) -> None:
        """Puts rows at flat indices of one layer."""
        self._rows_LNW[layer_idx, flat_T] = rows_TW.to(self._rows_LNW.dtype)

    def read(self, layer_idx: int, flat_S: Tensor) -> Tensor:
        """A copy of the rows at flat indices of one layer: (S, W) float32."""
        return self._rows_LNW[layer_idx].index_select(0, flat_S)

    def view(self, batch: Batch, pages: Sequence[Sequence[int]]) -> "PagedView":
        """The CacheView of a batch; pages[i] belong to the sequence of span i."""
        return PagedView(self, batch, pages)


class PagedView:
    """What the model sees of the cache in one step; a `model.batch.CacheView`."""

    def __init__(self, cache: PagedCache, batch: Batch, pages: Sequence[Sequence[int]]) -> None:
        self._cache = cache
        self._context_S = [
            cache.flat_rows(owned, begin=0, end=span.context_tokens)
            for span, owned in zip(batch.spans, pages, strict=True)
        ]
        self._append_T = torch.cat(
            [flat_S[span.first_position :] for span, flat_S in zip(batch.spans, self._context_S, strict=True)]
        )

    def append(self, layer_idx: int, rows_TW: Tensor) -> None:
        """Stores the batch's rows of one layer."""
        self._cache.write(layer_idx, self._append_T, rows_TW)

    def context(self, layer_idx: int, span_idx: int) -> Tensor:
        """All rows of a span's sequence, (S, W)."""
        return self._cache.read(layer_idx, self._context_S[span_idx])
