"""Sigmoid and SiLU whose values do not depend on where in a tensor they stand.

torch 2.13's `sigmoid` and `silu` compute the last elements of a tensor, those that do not fill a vector
register, by another formula than the others: a row would get other bits as the last of a batch. `exp`
does not.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`, elementwise; 0 where exp overflows."""
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`, elementwise."""
    return sigmoid(x).mul_(x)
