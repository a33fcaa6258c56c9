"""`moray bench dispatch`: every way is measured, with the other process gone at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.bench.dispatch import BASELINES, CASES
from cluster.cli.bench import app

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def report() -> dict:
    command = [str(Path(sys.executable).parent / "moray"), "bench", "dispatch", "--rounds", "100", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(done.stdout)


def test_every_case_has_every_transport_and_what_it_is_held_against(report: dict) -> None:
    ways = {way for pair in BASELINES for way in pair} | {"torch (gloo)"}
    assert {name: set(found) for name, found in report["cases"].items()} == {
        case.name: ways for case in CASES
    }
    assert all(0 < t["p50_us"] <= t["p99_us"] for found in report["cases"].values() for t in found.values())


def test_ratios_are_those_of_the_medians(report: dict) -> None:
    for case, found in report["cases"].items():
        for transport, baseline in BASELINES:
            wanted = found[transport]["p50_us"] / found[baseline]["p50_us"]
            assert report["ratios"][case][transport] == pytest.approx(wanted)


def test_table_names_machine_ways_and_ratios() -> None:
    before = os.sched_getaffinity(0)
    shown = CliRunner().invoke(app, ["dispatch", "--rounds", "100"])
    assert shown.exit_code == 0, shown.output
    assert "CPU" in shown.output
    assert all(way in shown.output for pair in BASELINES for way in pair)
    assert os.sched_getaffinity(0) == before
