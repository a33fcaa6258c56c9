"""The one linear operator of the project: FP32, and a row's result does not depend on the rows beside it.

A library matmul picks another kernel, and with it another order of additions, for another number of rows.
Measured with torch 2.13 (MKL 2024.2) on an AVX-512 host, at inner widths 32 to 7,168 and 1 to 700 rows:
  - `F.linear` gives a row other bits at 1 to 15 rows than at 16 and more;
  - with 2 threads it also gives other bits at 16 to 63 rows and above 200, at inner widths of 1,024 and more,
    because the inner sum is cut differently;
  - with at least 16 rows and at most 512 terms in each product there is no difference left: not between 16
    and 700 rows, not between 1, 2 and 4 threads;
  - a sum keeps its bits when zeros are appended to it as long as a product has 2 to 256 terms: one term takes
    yet another kernel, and above 256 the sum is cut where its length says.
So rows are padded to `MIN_ROWS` and inner sums cut at multiples of `INNER_CHUNK`, added in ascending order.
The price, same host: up to 16 rows cost what 16 rows cost (a single row 1.7 ms instead of 0.5 ms at
1024 x 2816, one thread); from 16 rows on it is free. What is promised is what tests/unit/model/test_linear.py
measures on the host at hand; another BLAS has to pass it too.
"""

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 16
"""Fewer rows are padded to this many."""
INNER_CHUNK = 256
"""Terms of one product; longer inner sums are added chunk by chunk."""


def linear(x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """`x_RD @ weight_FD.T`, each row with the same bits whatever rows stand beside it.

    Args:
        x_RD: (R, D) float32.
        weight_FD: (F, D) float32, F > 1; any strides.

    Returns:
        (R, F) float32.
    """
    num_rows, width = x_RD.shape
    if num_rows < MIN_ROWS:
        x_RD = functional.pad(x_RD, (0, 0, 0, MIN_ROWS - num_rows))
    weight_DF = weight_FD.t()
    y_RF = torch.mm(x_RD[:, :INNER_CHUNK], weight_DF[:INNER_CHUNK])
    for begin in range(INNER_CHUNK, width, INNER_CHUNK):
        x, weight = x_RD[:, begin : begin + INNER_CHUNK], weight_DF[begin : begin + INNER_CHUNK]
        if width - begin == 1:
            x, weight = functional.pad(x, (0, 1)), functional.pad(weight, (0, 0, 0, 1))
        y_RF.addmm_(x, weight)
    return y_RF[:num_rows]


def head_linear(x_THN: Tensor, weight_HNC: Tensor) -> Tensor:
    """One product per head, `x[:, h] @ weight[h]`, with the same promise; N at most 512.

    Args:
        x_THN: (T, H, N) float32.
        weight_HNC: (H, N, C) float32; any strides.

    Returns:
        (T, H, C) float32.
    """
    num_rows = x_THN.shape[0]
    if num_rows < MIN_ROWS:
        x_THN = functional.pad(x_THN, (0, 0, 0, 0, 0, MIN_ROWS - num_rows))
    return torch.bmm(x_THN.transpose(0, 1), weight_HNC).transpose(0, 1)[:num_rows]
