"""The optimiser of a run: Muon for inner matrices, AdamW for the rest and the indexer; a cosine for both."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from training.config import StageName, TrainingConfig
from training.weights import is_indexer, is_matrix

_STAGE_OF_INDEXER: tuple[StageName, ...] = ("warm-up", "sparse", "long")


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Rises over warmup_steps, then falls along half a cosine; a stage may have a line of its own."""
    stage, place = config.stage_at(step)
    if stage.own_lr is not None:
        return stage.own_lr * (1 - 0.9 * place / stage.num_steps)
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_cosine_steps - config.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.peak_lr * (config.final_lr_share + (1 - config.final_lr_share) * fall)


class Optimizer:
    """Three optimisers stepped as one; which of them move depends on the stage."""

    def __init__(self, weights: Mapping[str, Tensor], config: TrainingConfig) -> None:
        self._config = config
        unique = {
            id(tensor): (name, tensor)
            for name, tensor in reversed([*weights.items()])
            if tensor.requires_grad
        }
        main = {name: tensor for name, tensor in unique.values() if not is_indexer(name)}
        matrices = [tensor for name, tensor in main.items() if is_matrix(name, tensor)]
        rest = [tensor for name, tensor in main.items() if not is_matrix(name, tensor)]
        indexer = [tensor for name, tensor in unique.values() if is_indexer(name)]
        decay = config.weight_decay
        self._main: dict[str, torch.optim.Optimizer] = {
            "matrices": torch.optim.Muon(
                matrices, lr=config.peak_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            "rest": torch.optim.AdamW(rest, lr=config.peak_lr, betas=(0.9, 0.95), weight_decay=0.0),
        }
        self._indexer = torch.optim.AdamW(indexer, lr=config.indexer_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, step: int, stage: StageName) -> None:
        """Moves the weights of a stage along their gradients, and clears all gradients."""
        rate = learning_rate(self._config, step)
        if stage != "warm-up":
            for optimizer in self._main.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        if stage in _STAGE_OF_INDEXER:
            self._indexer.step()
        for optimizer in (*self._main.values(), self._indexer):
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, object]:
        """What `load_state` takes back."""
        return {name: optimizer.state_dict() for name, optimizer in self._all().items()}

    def load_state(self, state: Mapping[str, dict[str, object]]) -> None:
        """Goes on where `state` was taken."""
        for name, optimizer in self._all().items():
            optimizer.load_state_dict(state[name])

    def _all(self) -> dict[str, torch.optim.Optimizer]:
        return {**self._main, "indexer": self._indexer}
