"""Online selection bias: the gate's choice moved toward experts with less load, at serving time.

The auxiliary-loss-free rule of training, gone on with: after every few thousand choices of a layer, each
expert's offset moves by a fixed step toward mean load, within a small range; the offset joins
e_score_correction_bias for choosing, never for weighing. Unlike everything else that balances, it changes
outputs, so it is bounded, measured, and ends itself: when more choices of a window differ from those of the
plain gate than allowed, offsets are dropped for good.

Worked example (also a test): step 0.001, four experts of which a window chose 6, 2, 4 and 4 times, mean 4:
the offsets become -0.001, +0.001, 0 and 0.

Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, auxiliary-loss-free load balancing.

Letters: T tokens, E logical experts, K top-k.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.base import Kernels

_log = logging.getLogger(__name__)

WINDOW_CHOICES = 4096
"""Choices of a layer between two moves of its offsets."""


@dataclass(frozen=True, kw_only=True)
class OnlineBiasRules:
    """How far it may go."""

    step: float
    """Of each move, > 0; scores are sigmoids, within (0, 1)."""
    limit: float
    """Largest offset of either sign."""
    most_changed_share: float
    """Of a window's choices, (0, 1]; with more of them changed it ends itself."""


class _Layer:
    def __init__(self, num_experts: int) -> None:
        self.offset_E = torch.zeros(num_experts)
        self.count_E = torch.zeros(num_experts, dtype=torch.int64)
        self.num_changed = 0


class OnlineBias:
    """The offsets of every MoE layer of one worker; used by the engine thread."""

    def __init__(self, rules: OnlineBiasRules) -> None:
        self._rules = rules
        self._layers: dict[int, _Layer] = {}
        self.is_on = True
        """False once too many choices were changed."""
        self.num_choices = 0
        self.num_changed = 0
        """Choices so far, and those that the plain gate would not have made."""

    def choose(
        self, kernels: Kernels, logits_TE: Tensor, bias_E: Tensor, config: ModelConfig, *, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """`Kernels.choose_experts` with the layer's offsets, which learn from it."""
        plain_TK, plain_weights_TK = kernels.choose_experts(logits_TE, bias_E, config)
        if not self.is_on:
            return plain_TK, plain_weights_TK
        layer = self._layers.setdefault(layer_idx, _Layer(len(bias_E)))
        offset_E = layer.offset_E.to(bias_E.device)
        ids_TK, weights_TK = kernels.choose_experts(logits_TE, bias_E + offset_E, config)
        self._observe(layer, ids_TK.cpu(), plain_TK.cpu())
        return ids_TK, weights_TK

    def offset(self, layer_idx: int) -> Tensor | None:
        """(E,) float32 offsets of a layer; None = it has chosen nothing yet."""
        return self._layers[layer_idx].offset_E if layer_idx in self._layers else None

    def _observe(self, layer: _Layer, ids_TK: Tensor, plain_TK: Tensor) -> None:
        is_same_TK = (ids_TK[:, :, None] == plain_TK[:, None, :]).any(-1)
        num_changed = int(ids_TK.numel() - is_same_TK.sum())
        layer.count_E += torch.bincount(ids_TK.reshape(-1).to(torch.int64), minlength=len(layer.count_E))
        layer.num_changed += num_changed
        self.num_choices += ids_TK.numel()
        self.num_changed += num_changed
        num_seen = int(layer.count_E.sum())
        if num_seen >= WINDOW_CHOICES:
            self._move(layer, num_seen)

    def _move(self, layer: _Layer, num_seen: int) -> None:
        share = layer.num_changed / num_seen
        if share > self._rules.most_changed_share:
            self.is_on = False
            _log.warning(
                "online selection bias ends: %.4f of the choices changed, most_changed_share is %g",
                share,
                self._rules.most_changed_share,
            )
            return
        direction_E = torch.sign(num_seen / len(layer.count_E) - layer.count_E)
        layer.offset_E += self._rules.step * direction_E
        layer.offset_E.clamp_(-self._rules.limit, self._rules.limit)
        layer.count_E.zero_()
        layer.num_changed = 0
