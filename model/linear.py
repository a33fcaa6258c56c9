"""The linear operators of the torch kernels, in FP32.

A library's matmul adds up a row in another order for another number of rows or threads, so a row's last bits
may depend on what is computed beside it. The native kernels (model/kernels/native/) keep one order for every
row.
"""

import torch
from torch import Tensor
from torch.nn import functional


def linear(x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """`x_RD @ weight_FD.T`: (R, F) float32 of (R, D) and (F, D) float32."""
    return functional.linear(x_RD, weight_FD)


def head_linear(x_THN: Tensor, weight_HNC: Tensor) -> Tensor:
    """One product per head, `x[:, h] @ weight[h]`: (T, H, C) of (T, H, N) and (H, N, C) float32."""
    return torch.bmm(x_THN.transpose(0, 1), weight_HNC).transpose(0, 1)
