"""What decides a training run."""

from dataclasses import dataclass
from typing import Literal

StageName = Literal["dense", "warm-up", "sparse", "long"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps of one kind, one after another."""

    name: StageName
    """dense: the whole model but the indexer, attention to every position. warm-up: the indexer alone learns
    where that attention goes. sparse: everything, attention only where the indexer points. long: the same
    with long rows, so that every position of the context has been trained; selection biases rest.

    Source: DeepSeek-V3.2-Exp's report, section 2.1.1 (dense warm-up and sparse training)."""
    num_steps: int
    num_rows: int
    """Sequences in a batch."""
    row_tokens: int
    """Tokens in a sequence."""
    own_lr: float | None = None
    """Where the stage's learning rate begins, to fall on a line to a tenth of it; None = the run's cosine."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run; the same config and seed give the same batches."""

    seed: int = 1
    stages: tuple[Stage, ...]
    peak_lr: float = 3e-3
    """Of matrices (Muon) and of the rest (AdamW) alike: Muon's steps are scaled to AdamW's size."""
    final_lr_share: float = 0.03
    """The cosine ends at this share of peak_lr."""
    warmup_steps: int = 40
    indexer_lr: float = 3e-3
    weight_decay: float = 0.05
    mtp_loss_share: float = 0.3
    """Weight of the MTP layer's loss. Source: DeepSeek-V3 (arXiv 2412.19437), section 4.2."""
    prompt_loss_share: float = 0.1
    """Weight of a token that the model only reads (system, user, tool results) beside one that it writes."""
    bias_step: float = 0.002
    """Each step of a dense or sparse stage moves an expert's selection bias by so much toward mean load."""
    report_every_steps: int = 50

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def num_cosine_steps(self) -> int:
        """Steps of the stages that share the cosine; they come before those with a rate of their own."""
        return sum(stage.num_steps for stage in self.stages if stage.own_lr is None)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step's place in it, both from 0."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage, step
            step -= stage.num_steps
        return self.stages[-1], self.stages[-1].num_steps


def shipped_run() -> TrainingConfig:
    """The run that made assets/nano: about an hour on two cores."""
    return TrainingConfig(
        stages=(
            Stage(name="dense", num_steps=1500, num_rows=16, row_tokens=320),
            Stage(name="warm-up", num_steps=100, num_rows=16, row_tokens=320),
            Stage(name="sparse", num_steps=350, num_rows=16, row_tokens=320),
            # At the end of the cosine the rate is too low to learn far positions; the stages after it do,
            # the longest rows first, so that near ones end best.
            Stage(name="long", num_steps=15, num_rows=3, row_tokens=2048),
            Stage(name="long", num_steps=40, num_rows=4, row_tokens=1024, own_lr=2e-3),
            Stage(name="long", num_steps=25, num_rows=2, row_tokens=2048, own_lr=1e-3),
            Stage(name="sparse", num_steps=95, num_rows=4, row_tokens=1024, own_lr=2e-3),
            Stage(name="sparse", num_steps=35, num_rows=16, row_tokens=320, own_lr=5e-4),
            Stage(name="sparse", num_steps=60, num_rows=4, row_tokens=1024, own_lr=2e-3),
            Stage(name="sparse", num_steps=120, num_rows=16, row_tokens=320, own_lr=1.5e-3),
        )
    )


def smoke_run() -> TrainingConfig:
    """A few steps of every stage: what tests run."""
    return TrainingConfig(
        stages=(
            Stage(name="dense", num_steps=12, num_rows=4, row_tokens=256),
            Stage(name="warm-up", num_steps=4, num_rows=4, row_tokens=256),
            Stage(name="sparse", num_steps=4, num_rows=4, row_tokens=256),
            Stage(name="long", num_steps=1, num_rows=1, row_tokens=1024, own_lr=1e-3),
        ),
        warmup_steps=4,
        report_every_steps=4,
    )
