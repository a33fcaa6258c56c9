"""The training loop: batches, stages, reports, and going on after a stop."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.config import ModelConfig
from model.reference import Attention, Reference, ReferenceOutput
from training import losses
from training.batches import Batch, BatchMaker
from training.config import Stage, TrainingConfig
from training.optimizer import Optimizer, learning_rate
from training.weights import initial_weights

_HELD_OUT_STEPS = 2
"""Batches of the held-out side in a report."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a run stands; losses in nats per token, on held-out documents."""

    step: int
    stage: str
    elapsed_s: float
    num_tokens: int
    """Seen so far, padding included."""
    learning_rate: float
    train_loss: float
    loss: float
    mtp_loss: float
    indexer_loss: float
    """0 where the indexer does not run."""
    right_share: float
    """Of the tokens that the model writes, how many greedy decoding gets right, given those before."""
    accepted_share: float
    """Of MTP drafts, how many the main head confirms."""
    balance: float
    """Mean over maximum of the rows per expert, averaged over layers; 1 = even."""


@dataclass(kw_only=True)
class _Progress:
    """Written by the loop alone."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    train_loss: float = 0.0


class Trainer:
    """One run of one model."""

    def __init__(self, model_config: ModelConfig, config: TrainingConfig, tokenizer: Tokenizer) -> None:
        self.model_config = model_config
        self.config = config
        self.weights = initial_weights(model_config, seed=config.seed)
        self._model = Reference(model_config, self.weights)
        self._optimizer = Optimizer(self.weights, config)
        self._batches = BatchMaker(tokenizer, seed=config.seed, prompt_share=config.prompt_loss_share)
        self._progress = _Progress()

    def run(
        self,
        on_report: Callable[[Report], None],
        *,
        save_to: Path | None = None,
        until_step: int | None = None,
    ) -> None:
        """Trains to the last step, or to until_step; reports and saves on the way and at the end."""
        last_step = self.config.num_steps if until_step is None else min(until_step, self.config.num_steps)
        while self._progress.step < last_step:
            started_s = time.monotonic()
            stage, _ = self.config.stage_at(self._progress.step)
            self._train_step(stage)
            self._progress.step += 1
            self._progress.num_tokens += stage.num_rows * stage.row_tokens
            self._progress.elapsed_s += time.monotonic() - started_s
            if self._progress.step % self.config.report_every_steps == 0 or self._progress.step == last_step:
                on_report(self.report(stage))
                if save_to is not None:
                    self.save(save_to)

    def report(self, stage: Stage) -> Report:
        """How the model does on held-out documents now, with the attention of a stage."""
        sums = torch.zeros(6)
        with torch.no_grad():
            for held_out_step in range(_HELD_OUT_STEPS):
                batch = self._batches.make(held_out_step, stage, held_out=True)
                output = self._model.forward(batch.token_ids_BT, attention=_attention(stage))
                first, second = losses.next_token(output, batch), losses.second_next_token(output, batch)
                kl = losses.indexer_loss(output) if output.index_scores else torch.zeros(())
                accepted = losses.drafts_accepted(output, batch)
                rows = losses.expert_rows(output, batch, num_experts=self.model_config.n_routed_experts)
                shares = (first.num_right, accepted, losses.balance(rows))
                sums += torch.tensor([float(first.loss), float(second.loss), float(kl), *shares])
        loss, mtp_loss, kl_mean, right, accepted, balance = (sums / _HELD_OUT_STEPS).tolist()
        return Report(
            step=self._progress.step,
            stage=stage.name,
            elapsed_s=self._progress.elapsed_s,
            num_tokens=self._progress.num_tokens,
            learning_rate=learning_rate(self.config, self._progress.step),
            train_loss=self._progress.train_loss,
            loss=loss,
            mtp_loss=mtp_loss,
            indexer_loss=kl_mean,
            right_share=right,
            accepted_share=accepted,
            balance=balance,
        )

    def save(self, path: Path) -> None:
        """Writes everything that `resume` needs; the file appears whole."""
        partial = path.with_suffix(".partial")
        state = {
            "weights": {name: tensor.detach() for name, tensor in self.weights.items()},
            "optimizer": self._optimizer.state(),
            "progress": asdict(self._progress),
        }
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on where `save` left off; the next batch is the one that would have come."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(state["weights"][name])
        self._optimizer.load_state(state["optimizer"])
        self._progress = _Progress(**state["progress"])

    def _train_step(self, stage: Stage) -> None:
        batch = self._batches.make(self._progress.step, stage)
        output = self._model.forward(batch.token_ids_BT, attention=_attention(stage))
        loss = self._loss(output, batch, stage)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.step(self._progress.step, stage.name)
        if stage.name in {"dense", "sparse"}:
            self._balance_experts(output, batch)
        self._progress.train_loss = float(loss.detach())

    def _loss(self, output: ReferenceOutput, batch: Batch, stage: Stage) -> Tensor:
        if stage.name == "warm-up":
            return losses.indexer_loss(output)
        main, mtp = losses.next_token(output, batch).loss, losses.second_next_token(output, batch).loss
        loss = main + self.config.mtp_loss_share * mtp
        return loss if stage.name == "dense" else loss + losses.indexer_loss(output)

    def _balance_experts(self, output: ReferenceOutput, batch: Batch) -> None:
        rows = losses.expert_rows(output, batch, num_experts=self.model_config.n_routed_experts)
        for layer_idx, rows_E in rows.items():
            bias_E = self.weights[f"model.layers.{layer_idx}.mlp.gate.e_score_correction_bias"]
            losses.apply_bias_update(bias_E, rows_E, step=self.config.bias_step)


def _attention(stage: Stage) -> Attention:
    if stage.name == "dense":
        return "dense"
    return "dense with indexer" if stage.name == "warm-up" else "sparse"
