"""The loop: what each stage moves, going on after a stop, the learning rate."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.unit.training.small_run import CONFIG, small_trainer
from training.config import Stage
from training.optimizer import learning_rate
from training.plots import plot_run
from training.trainer import Report, Trainer


def run(trainer: Trainer, *, until: int | None = None, save_to: Path | None = None) -> list[Report]:
    reports: list[Report] = []
    trainer.run(reports.append, until_step=until, save_to=save_to)
    return reports


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.weights.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_moves_what_it_should():
    trainer = small_trainer()
    start = snapshot(trainer)
    run(trainer, until=3)
    dense = snapshot(trainer)
    run(trainer, until=5)
    warm = snapshot(trainer)
    run(trainer)
    in_dense, in_warm_up, in_sparse = (
        changed(start, dense),
        changed(dense, warm),
        changed(warm, snapshot(trainer)),
    )
    is_indexer = {name for name in start if ".indexer." in name}
    assert in_dense.isdisjoint(is_indexer)
    assert any(name.endswith("e_score_correction_bias") for name in in_dense)
    assert in_warm_up
    assert in_warm_up <= is_indexer
    assert in_sparse & is_indexer
    assert in_sparse - is_indexer


def test_loss_falls():
    reports = run(small_trainer())
    assert [report.step for report in reports] == [2, 4, 6, 7]
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].num_tokens == sum(s.num_steps * s.num_rows * s.row_tokens for s in CONFIG.stages)


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, stop_at: int):
    whole, stopped, resumed = small_trainer(), small_trainer(), small_trainer()
    run(whole)
    run(stopped, until=stop_at, save_to=tmp_path / "state.pt")
    resumed.resume(tmp_path / "state.pt")
    run(resumed)
    assert changed(snapshot(whole), snapshot(resumed)) == set()


def test_mtp_shares_embedding_and_head_with_the_model():
    trainer = small_trainer()
    run(trainer, until=2)
    mtp = f"model.layers.{trainer.model_config.num_hidden_layers}"
    assert torch.equal(
        trainer.weights[f"{mtp}.embed_tokens.weight"], trainer.weights["model.embed_tokens.weight"]
    )
    assert torch.equal(trainer.weights[f"{mtp}.shared_head.head.weight"], trainer.weights["lm_head.weight"])


def test_learning_rate_rises_then_follows_a_cosine_to_its_end():
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.num_steps + 1)]
    assert rates[0] == CONFIG.peak_lr / 2
    assert max(rates) == CONFIG.peak_lr
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(CONFIG.peak_lr * CONFIG.final_lr_share)


def test_stage_with_a_rate_of_its_own_falls_on_a_line_and_leaves_the_cosine_alone():
    tail = Stage(name="long", num_steps=4, num_rows=1, row_tokens=640, own_lr=1e-3)
    longer = replace(CONFIG, stages=(*CONFIG.stages, tail))
    before = [learning_rate(longer, step) for step in range(CONFIG.num_steps)]
    assert before == [learning_rate(CONFIG, step) for step in range(CONFIG.num_steps)]
    after = [learning_rate(longer, CONFIG.num_steps + place) for place in range(4)]
    assert after == pytest.approx([1e-3, 7.75e-4, 5.5e-4, 3.25e-4])


def test_curves_are_a_picture(tmp_path: Path):
    reports = run(small_trainer(), until=4)
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(asdict(report)) + "\n" for report in reports))
    plot_run(tmp_path / "reports.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
