"""Attention in torch: what the native kernels are compared with, and what runs on GPUs.

Letters: R rows, H heads, N nope width, P rope width, O value width per head, C latent, X = C + P, S cached
positions, U selected positions, M = R * H.
"""

import math

import torch
from torch import Tensor

from model.linear import head_linear, linear

BLOCK_VALUES = 4 * 1024 * 1024
"""Float32 values in attention's largest temporary (16 MiB): rows are taken in blocks to respect it."""


def row_blocks(num_rows: int, values_per_row: int) -> list[tuple[int, int]]:
    """Row ranges whose largest temporary stays within BLOCK_VALUES (one row at least)."""
    step = max(1, BLOCK_VALUES // values_per_row)
    return [(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]


def attend_expanded(query_RHQ: Tensor, kv_SHX: Tensor, rope_SP: Tensor, *, first_position: int) -> Tensor:
    """Causal attention over keys and values of every head: (R, H, O).

    Args:
        query_RHQ: (R, H, N + P), scaled.
        kv_SHX: (S, H, N + O).
        rope_SP: (S, P), one rope key for all heads.
        first_position: of row 0; S is at least that and R together.
    """
    num_rows, num_heads, query_width = query_RHQ.shape
    nope_width = query_width - rope_SP.shape[1]
    key_SHQ = torch.cat((kv_SHX[..., :nope_width], rope_SP[:, None].expand(-1, num_heads, -1)), dim=-1)
    parts = []
    for begin, end in row_blocks(num_rows, num_heads * (first_position + num_rows)):
        num_seen = first_position + end
        score_RHS = head_linear(query_RHQ[begin:end], key_SHQ[:num_seen].permute(1, 2, 0))
        share_RHS, total_RH = _shares(score_RHS, first_position=first_position + begin)
        value_RHO = head_linear(share_RHS, kv_SHX[:num_seen, :, nope_width:].transpose(0, 1))
        parts.append(value_RHO / total_RH[..., None])
    return torch.cat(parts)


def attend_causal(query_RHX: Tensor, key_SX: Tensor, *, first_position: int, latent_width: int) -> Tensor:
    """Causal attention over the latent: (R, H, C) of queries (R, H, X) and cache rows (S, X)."""
    num_rows, num_heads, _ = query_RHX.shape
    parts = []
    for begin, end in row_blocks(num_rows, num_heads * (first_position + num_rows)):
        seen_SX = key_SX[: first_position + end]
        score_MS = linear(query_RHX[begin:end].flatten(0, 1), seen_SX)
        score_RHS = score_MS.view(end - begin, num_heads, -1)
        share_RHS, total_RH = _shares(score_RHS, first_position=first_position + begin)
        latent_MC = linear(share_RHS.flatten(0, 1), seen_SX[:, :latent_width].t())
        parts.append(latent_MC.view(end - begin, num_heads, -1) / total_RH[..., None])
    return torch.cat(parts)


def attend_selected(query_RHX: Tensor, rows_NW: Tensor, selected_RU: Tensor, *, latent_width: int) -> Tensor:
    """Attention of each row over the cache rows that it names: (R, H, C)."""
    width = query_RHX.shape[-1]
    parts = []
    for begin, end in row_blocks(len(query_RHX), selected_RU.shape[1] * rows_NW.shape[1]):
        key_RUX = rows_NW[selected_RU[begin:end]][..., :width]
        share_RHU = torch.bmm(query_RHX[begin:end], key_RUX.transpose(1, 2)).softmax(-1)
        parts.append(torch.bmm(share_RHU, key_RUX[..., :latent_width]))
    return torch.cat(parts)


def _shares(score_RHS: Tensor, *, first_position: int) -> tuple[Tensor, Tensor]:
    """Unnormed softmax of the visible positions (R, H, S), and its sums (R, H); overwrites the scores."""
    num_rows, _, num_seen = score_RHS.shape
    column_S = torch.arange(num_seen, device=score_RHS.device)
    last_R = torch.arange(first_position, first_position + num_rows, device=score_RHS.device)
    score_RHS = score_RHS.masked_fill_((column_S > last_R[:, None])[:, None], -math.inf)
    share_RHS = score_RHS.sub_(score_RHS.amax(-1, keepdim=True)).exp_()
    return share_RHS, share_RHS.sum(-1)
