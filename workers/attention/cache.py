"""The paged latent cache: one row a token and layer, holding latent, rope key and indexer key.

L layers (MTP included), P pages, S tokens of a sequence, T rows of a batch, W row width
(`CacheLayout`), B stored places of a row: W float32 values, or the bytes of a compact form. A token's row
has the flat index page * page_tokens + offset in every layer.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, CacheView, RowsView
from model.cache_layout import CacheLayout
from model.compact_rows import CompactRows, CompactView, RowCodec
from wire.frames import Array

CacheForm = Literal["float32", "bfloat16", "fp8"]


class PagedCache:
    """The tensors behind the pages; written and read by the engine thread only."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        layout: CacheLayout,
        form: CacheForm = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_tokens = page_tokens
        self.num_layers = num_layers
        self._layout = layout
        codec = None if form == "float32" else RowCodec(layout, form)
        self.width = layout.width if codec is None else codec.row_bytes
        """B."""
        dtype = torch.float32 if codec is None else torch.uint8
        self.dtype_name = str(dtype).removeprefix("torch.")
        """Of a stored place."""
        self._rows_LNB = torch.zeros(
            num_layers, num_pages * page_tokens, self.width, dtype=dtype, device=device
        )
        self._compact = (
            None if codec is None else CompactRows(layout=layout, codec=codec, bytes_LNB=self._rows_LNB)
        )

    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self._rows_LNB.numel() * self._rows_LNB.element_size()

    def flat_rows(self, pages: Sequence[int], *, begin: int, end: int) -> Tensor:
        """Flat indices of the tokens [begin, end) of a sequence that owns `pages`: (end - begin,) int64."""
        first_page = begin // self.page_tokens
        owned = np.asarray(pages[first_page : -(-end // self.page_tokens)], dtype=np.int64)
        rows = (owned[:, None] * self.page_tokens + np.arange(self.page_tokens)).reshape(-1)
        skipped = first_page * self.page_tokens
        return torch.from_numpy(rows[begin - skipped : end - skipped]).to(self._rows_LNB.device)

    def write(self, layer_idx: int, flat_T: Tensor, rows_TB: Tensor) -> None:
        """Puts stored rows at flat indices of one layer."""
        self._rows_LNB[layer_idx, flat_T] = rows_TB.to(self._rows_LNB.device)

    def read(self, layer_idx: int, flat_S: Tensor) -> Tensor:
        """A copy of the stored rows at flat indices of one layer: (S, B), float32 or uint8."""
        return self._rows_LNB[layer_idx].index_select(0, flat_S)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers."""
        return self.num_layers * self.page_tokens * self.width * self._rows_LNB.element_size()

    @property
    def page_like(self) -> Array:
        """An array of the shape and dtype of `read_page`, without its bytes."""
        shape = (self.num_layers, self.page_tokens, self.width)
        return np.broadcast_to(np.zeros((), dtype=self.dtype_name), shape)

    def read_page(self, page: int) -> Array:
        """A copy of a page's stored rows: (L, page_tokens, B)."""
        begin = page * self.page_tokens
        rows_LTB = self._rows_LNB[:, begin : begin + self.page_tokens]
        return np.array(rows_LTB.cpu().numpy(), order="C", copy=True)

    def write_page(self, page: int, rows_LTB: Array) -> None:
        """Puts back what `read_page` gave, into any page."""
        begin = page * self.page_tokens
        self._rows_LNB[:, begin : begin + self.page_tokens] = torch.from_numpy(rows_LTB)

    def copy_page(self, source: int, target: int, *, num_tokens: int) -> None:
        """Copies the first rows of a page into another one, in every layer."""
        begins = [page * self.page_tokens for page in (target, source)]
        into, out_of = (self._rows_LNB[:, begin : begin + num_tokens] for begin in begins)
        into.copy_(out_of)

    def view(self, batch: Batch, pages: Sequence[Sequence[int]]) -> CacheView:
        """The CacheView of a batch; pages[i] belong to the sequence of span i."""
        context_S = tuple(
            self.flat_rows(owned, begin=0, end=span.context_tokens)
            for span, owned in zip(batch.spans, pages, strict=True)
        )
        if self._compact is not None:
            return CompactView(self._compact, batch, context_S)
        return RowsView(self._layout, self._rows_LNB, batch, context_S)
