"""The shipped model's scores, from the script that measures them, on a few held-out prompts of each kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NUM = 16
ASSETS_LIMIT_BYTES = 20 * 2**20


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [sys.executable, "benchmarks/nano_tasks.py", "--num", str(NUM), "--threads", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# The floors leave room for two prompts of sixteen beside the goals of the model card.
@pytest.mark.parametrize(
    ("kind", "floor"), [("arithmetic", 0.75), ("tool", 0.8), ("tool_loop", 0.8), ("json", 0.85)]
)
@pytest.mark.parametrize("precision", ["float32", "fp8", "int8"])
def test_held_out_tasks_are_solved(report: dict[str, Any], precision: str, kind: str, floor: float) -> None:
    assert report["scores"][precision][kind] >= floor


def test_drafts_are_accepted(report: dict[str, Any]) -> None:
    assert report["mtp"]["share"] >= 0.7


def test_sparse_attention_costs_next_to_nothing(report: dict[str, Any]) -> None:
    assert report["measures"]["loss_sparse"] <= 1.02 * report["measures"]["loss_dense"]


def test_learned_bias_evens_the_load(report: dict[str, Any]) -> None:
    assert report["measures"]["balance"] >= 0.5
    assert report["measures"]["balance_without_bias"] < 0.8 * report["measures"]["balance"]


def test_model_fits_in_the_repository() -> None:
    assert (
        sum(file.stat().st_size for file in (ROOT / "assets").rglob("*") if file.is_file())
        < ASSETS_LIMIT_BYTES
    )
