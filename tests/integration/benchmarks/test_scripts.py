"""Every script of benchmarks/ starts; the quick ones run on small inputs."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.workers.lab import needs_nixl
from tests.reference_data import LOGIT_TOLERANCE, SHAPES

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "benchmarks").glob("[a-z]*.py"))


def run_script(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A script as `make bench` starts it, with one thread."""
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_scripts_are_found() -> None:
    assert {path.stem for path in SCRIPTS} >= {"against_peers", "long_context", "nano_tasks", "precision"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_has_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: most of them load torch."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_long_context_compares_two_lengths() -> None:
    done = run_script(
        "long_context", "--short", "40", "--long", "120", "--repeats", "1", "--threads", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert [line.rsplit(":", 1)[0] for line in done.stderr.splitlines() if line.startswith("round")] == [
        "round 0 40 tokens",
        "round 0 120 tokens",
    ]
    assert set(report["ms"]) == {"40", "120"}
    short_ms, long_ms = (report["ms_without_indexer"][length] for length in ("40", "120"))
    assert report["ratio"] == long_ms / short_ms > 0
    parts = report["ms"]["120"]
    assert sum(parts.values()) - parts["indexer"] == pytest.approx(long_ms)


def test_precision_of_float32_is_that_of_the_goldens() -> None:
    done = run_script("precision", "--dtypes", "float32", "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [(row["shape"], row["dtype"]) for row in rows] == [(shape, "float32") for shape in SHAPES]
    assert min(row["top1"] for row in rows) == 1
    assert max(row["mean_kl"] for row in rows) < 1e-9
    assert max(row["max_logit_error"] / row["logit_std"] for row in rows) < LOGIT_TOLERANCE


def test_replica_bias_levels_workers_better_than_shares_alone() -> None:
    done = run_script("replica_bias", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    ratio = {(str(r["case"]), r["way"]): r["max_over_mean"] for r in results}
    cases = {case for case, _ in ratio}
    assert len(cases) >= 5
    assert all(1 <= ratio[case, "water-filling"] < ratio[case, "shares alone"] for case in cases)
    assert all(result["plan_us"] > 0 for result in results)


@pytest.mark.slow
def test_first_token_of_a_cached_prompt_is_compared_with_a_cold_one() -> None:
    small = ("--model", "tiny", "--cached", "160", "--own", "8", "--repeats", "1")
    done = run_script("first_token_cached", *small, "--json")
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    assert [row["roles"] for row in results] == ["apart", "both"]
    assert all(row["ratio"] == row["cached_ms"] / row["cold_ms"] > 0 for row in results)


@pytest.mark.slow
def test_long_prompts_meet_streams_in_both_arrangements() -> None:
    small = ("--streams", "1", "--long-prompts", "2", "--long-tokens", "600", "--turns", "1")
    done = run_script("prefill_apart", *small, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    p99 = {name: times["busy"]["p99"] for name, times in report["ms"].items()}
    assert report["busy_p99_ratio"] == p99["apart"] / p99["both"] > 0


@pytest.mark.slow
def test_overload_is_refused_and_what_is_accepted_is_answered() -> None:
    small = ("--room", "2", "--requests", "6", "--turns", "1", "--times", "4")
    done = run_script("overload", *small, "--json")
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)["results"]
    house, overload = results["full house"], results["overload"]
    assert (house["num_done"], house["num_refused"]) == (6, 0)
    assert overload["num_done"] + overload["num_refused"] == overload["num_requests"] == 24
    assert overload["num_refused"] > 0 < overload["num_done"]


@pytest.mark.slow
@needs_nixl
def test_rows_are_handed_over_both_ways() -> None:
    small = ("--tokens", "100", "--chunk", "64", "--size", "tiny", "--repeats", "1", "--rounds", "1")
    done = run_script("handover", *small, "--json")
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    assert [row["transport"] for row in results] == ["grpc", "nixl"]
    assert all(len(row["seconds"]) == 1 for row in results)


def test_speculation_compares_with_drafts_and_without() -> None:
    flags = ["--batches", "1", "--chances", "1", "--new-tokens", "16", "--repeats", "1", "--threads", "1"]
    done = run_script("speculation", "--model", "nano", *flags, "--max-drafts", "1", "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["batch"], result["chances"]) == (1, [1.0])
    assert 0 < result["drafts"] <= 1
    assert result["ratio"] > 0
