"""A whole run in seconds: the command, its files, and the checkpoint in the serving engine's model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.tensor_names import expected_tensors
from tests.unit.model.harness import load_model, run_prompt

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m training --smoke` leaves."""
    out = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "training", "--smoke", "--threads", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=500)
    return out


def test_run_learns_and_says_how_far_it_is(work_dir: Path) -> None:
    reports = [json.loads(line) for line in (work_dir / "reports.jsonl").read_text().splitlines()]
    assert [report["stage"] for report in reports] == ["dense", "dense", "dense", "warm-up", "sparse", "long"]
    assert reports[2]["loss"] < 0.8 * reports[0]["loss"]
    assert reports[-1]["balance"] > 0
    assert (work_dir / "curves.png").stat().st_size > 10_000


def test_checkpoint_gives_the_same_scores_in_the_serving_model(work_dir: Path) -> None:
    checkpoint = Checkpoint.open(work_dir / "checkpoint")
    checkpoint.check()
    shapes = expected_tensors(checkpoint.config)
    tensors = {name: checkpoint.read(name, shape=shape).float() for name, shape in shapes.items()}
    prompt = [0, *range(300, 420)]
    with torch.no_grad():
        expected = Reference(checkpoint.config, tensors).forward(prompt)
    got = run_prompt(load_model(work_dir / "checkpoint"), prompt)
    torch.testing.assert_close(got.logits, expected.logits_TV, rtol=1e-4, atol=1e-4)
