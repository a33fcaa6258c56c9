"""Cache rows in fewer bytes: latents in BF16, or in FP8 with factors as DeepSeek does, rope keys in BF16.

The kernels read FP32, so a step gets the rows that it reads as FP32, layer by layer, in a buffer of its own;
the rows that it adds go through the compact form before anything reads them. A row is therefore read with the
same bits by its own step, by later ones, and by another worker.

The bytes of a row, in order: indexer's key (4 a place, as `CacheLayout` has it), then for BF16 rope key and
latent (2 a value), for FP8 factors (FP32, one for 128 values of the latent), rope key (BF16) and latent (1 a
value). A factor is a power of two, so that what was decoded once is encoded to the same values again. V3.2's
row with FP32 keys has 2,816 bytes in FP32, 1,664 in BF16 and 1,168 in FP8.

Letters: L layers, N rows of the cache, B bytes of a row, S rows that are read, T rows of the batch, W row
width, C latent, P rope width, G groups of V = 128 values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.batch import Batch, LayerCache
from model.cache_layout import CacheLayout

CompactForm = Literal["bfloat16", "fp8"]

_GROUP = 128
"""Latent values with one factor."""
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_ALIGN_BYTES = 8


class RowCodec:
    """FP32 rows to bytes and back."""

    def __init__(self, layout: CacheLayout, form: CompactForm) -> None:
        self._layout = layout
        self._is_fp8 = form == "fp8"
        self._num_groups = -(-layout.latent // _GROUP) if self._is_fp8 else 0
        self.key_bytes = (layout.width - layout.key_begin) * 4
        """Of the indexer's key, the first ones."""
        self._rope_begin = self.key_bytes + self._num_groups * 4
        self._latent_begin = self._rope_begin + layout.rope * 2
        num_bytes = self._latent_begin + layout.latent * (1 if self._is_fp8 else 2)
        self.row_bytes = -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES

    def encode(self, rows_TW: Tensor) -> Tensor:
        """(T, B) uint8 of (T, W) float32."""
        layout = self._layout
        parts = [_bytes(rows_TW[:, layout.key_begin :])]
        latent_TC = rows_TW[:, : layout.latent]
        rope_TP = _bytes(rows_TW[:, layout.latent : layout.key_begin].to(torch.bfloat16))
        if self._is_fp8:
            latent_TGV = self._grouped(latent_TC)
            scale_TG = _power_of_two(latent_TGV.abs().amax(-1) / _FP8_MAX)
            codes_TC = (latent_TGV / scale_TG[..., None]).to(_FP8).flatten(1)[:, : layout.latent]
            parts += [_bytes(scale_TG), rope_TP, _bytes(codes_TC)]
        else:
            parts += [rope_TP, _bytes(latent_TC.to(torch.bfloat16))]
        bytes_TB = torch.cat(parts, dim=1)
        return pad(bytes_TB, (0, self.row_bytes - bytes_TB.shape[1]))

    def decode_keys(self, bytes_SB: Tensor) -> Tensor:
        """The indexer's keys, (S, I) float32 places, of the first `key_bytes` of (S, B) uint8."""
        return bytes_SB[:, : self.key_bytes].view(torch.float32)

    def decode_latents(self, bytes_SB: Tensor) -> Tensor:
        """Latents and rope keys, (S, C + P) float32, of (S, B - key_bytes) uint8: what is behind the keys."""
        layout = self._layout
        rope_begin, latent_begin = (at - self.key_bytes for at in (self._rope_begin, self._latent_begin))
        rows_SX = torch.empty(len(bytes_SB), layout.key_begin, device=bytes_SB.device)
        rows_SX[:, layout.latent :] = bytes_SB[:, rope_begin:latent_begin].view(torch.bfloat16)
        if self._is_fp8:
            scale_SG = bytes_SB[:, :rope_begin].view(torch.float32)
            codes_SC = bytes_SB[:, latent_begin : latent_begin + layout.latent].view(_FP8)
            latent_SGV = self._grouped(codes_SC.to(torch.float32)) * scale_SG[..., None]
            rows_SX[:, : layout.latent] = latent_SGV.flatten(1)[:, : layout.latent]
        else:
            latent_end = latent_begin + layout.latent * 2
            rows_SX[:, : layout.latent] = bytes_SB[:, latent_begin:latent_end].view(torch.bfloat16)
        return rows_SX

    def decode(self, bytes_SB: Tensor) -> Tensor:
        """(S, W) float32 of (S, B) uint8."""
        key_SI = self.decode_keys(bytes_SB)
        return torch.cat((self.decode_latents(bytes_SB[:, self.key_bytes :]), key_SI), dim=1)

    def _grouped(self, latent_TC: Tensor) -> Tensor:
        """(T, G, 128), zeros behind the last value."""
        padded = pad(latent_TC, (0, self._num_groups * _GROUP - self._layout.latent))
        return padded.reshape(len(padded), self._num_groups, _GROUP)


@dataclass(frozen=True, kw_only=True)
class CompactRows:
    """All rows of a cache, and how they are read."""

    layout: CacheLayout
    codec: RowCodec
    bytes_LNB: Tensor
    """(L, N, B) uint8."""


class CompactView:
    """A `CacheView` of rows in a compact form; one buffer of FP32 rows serves all layers in turn.

    All of the indexer's keys are made FP32, and those latents that attention says it reads.
    """

    def __init__(
        self,
        store: CompactRows,
        batch: Batch,
        context_S: tuple[Tensor, ...],
    ) -> None:
        """Takes all rows, and for each span of the batch the indices of its sequence, (S,) int64."""
        self._store = store
        self._stored_S = torch.cat(context_S)
        ends = torch.tensor([len(ids) for ids in context_S]).cumsum(0).tolist()
        read_S = torch.arange(len(self._stored_S), device=self._stored_S.device)
        self._context_S = tuple(
            read_S[end - len(ids) : end] for ids, end in zip(context_S, ends, strict=True)
        )
        self._append_T = torch.cat(
            [ids[span.first_position :] for span, ids in zip(batch.spans, self._context_S, strict=True)]
        )
        self._rows_SW = torch.empty(len(read_S), store.layout.width, device=read_S.device)

    def layer(self, layer_idx: int) -> LayerCache:
        """One layer's rows; valid until the next layer is asked for."""
        store, layout = self._store, self._store.layout
        key_bytes = store.codec.key_bytes
        keys_SB = store.bytes_LNB[layer_idx, :, :key_bytes].index_select(0, self._stored_S)
        self._rows_SW[:, layout.key_begin :] = store.codec.decode_keys(keys_SB)
        return LayerCache(
            layout=layout,
            rows_NW=self._rows_SW,
            append_T=self._append_T,
            context_S=self._context_S,
            on_stored=lambda: self._keep(layer_idx),
            on_read=lambda read: self._read(layer_idx, read),
        )

    def _read(self, layer_idx: int, read: Tensor) -> None:
        """Makes latents and rope keys of rows of the buffer FP32, each once."""
        store, read_S = self._store, read
        if read.ndim > 1:
            is_read_S = torch.zeros(len(self._stored_S), dtype=torch.bool, device=read.device)
            is_read_S[read.flatten()] = True
            read_S = is_read_S.nonzero().flatten()
        behind_NB = store.bytes_LNB[layer_idx, :, store.codec.key_bytes :]
        bytes_SB = behind_NB.index_select(0, self._stored_S[read_S])
        self._rows_SW[read_S, : store.layout.key_begin] = store.codec.decode_latents(bytes_SB)

    def _keep(self, layer_idx: int) -> None:
        """Takes the batch's rows from the buffer, which holds them as they are read later from now on."""
        store = self._store
        bytes_TB = store.codec.encode(self._rows_SW[self._append_T])
        store.bytes_LNB[layer_idx, self._stored_S[self._append_T]] = bytes_TB
        self._rows_SW[self._append_T] = store.codec.decode(bytes_TB)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _power_of_two(least: Tensor) -> Tensor:
    """The smallest power of two that is not less than each value, and one that is no denormal."""
    mantissa, exponent = torch.frexp(least)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(least), exponent.clamp(min=-100))
