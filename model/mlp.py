"""SwiGLU: the MLP of dense layers, of the shared expert and of every routed expert."""

import torch
from torch import Tensor

from model.activations import silu
from model.linear import linear
from model.weights import MlpWeights


def swiglu(x_RD: Tensor, weights: MlpWeights) -> Tensor:
    """`down(silu(gate x) * up x)` of (R, D) float32 rows: (R, D) float32, bits as in `linear`."""
    gate_RF = silu(linear(x_RD, weights.gate_FD))
    return linear(torch.mul(gate_RF, linear(x_RD, weights.up_FD)), weights.down_DF)
