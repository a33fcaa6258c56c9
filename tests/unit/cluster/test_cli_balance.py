"""`moray balance`: writes a plan that its own report describes, and refuses what it cannot plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cluster.balance.measure import balance_of, count_moves, count_replicas, worker_loads
from cluster.cli.balance import balance
from wire.errors import ConfigError

APP = typer.Typer()
APP.command()(balance)
RUNNER = CliRunner()
LAYERS, EXPERTS, WORKERS, SLOTS = 3, 16, 8, 3


def loads(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, (LAYERS, EXPERTS)) * 1000


def run(tmp_path: Path, array: Any, *options: str, out: str = "plan.json") -> Any:
    np.save(tmp_path / "loads.npy", array)
    arguments = [
        "--loads",
        str(tmp_path / "loads.npy"),
        "--out",
        str(tmp_path / out),
        "--workers",
        str(WORKERS),
    ]
    return RUNNER.invoke(APP, [*arguments, *(options or ("--slots", str(SLOTS)))], env={"COLUMNS": "120"})


def read_plan(path: Path) -> np.ndarray:
    return np.array(json.loads(path.read_text())["phy2log"]).reshape(LAYERS, WORKERS, SLOTS)


def test_plan_is_written_as_it_is_reported(tmp_path: Path) -> None:
    result = run(tmp_path, loads(), "--slots", str(SLOTS), "--nodes", "2", "--json")
    report, plan = json.loads(result.stdout), read_plan(tmp_path / "plan.json")
    found = balance_of(worker_loads(loads(), plan))
    assert result.exit_code == 0
    assert (count_replicas(plan, EXPERTS) > 0).all()
    assert report["balance"] == pytest.approx({"mean": found.mean(), "worst_layer": found.min()})
    assert report["balance_with_shares"]["mean"] >= report["balance"]["mean"]
    assert (report["balance_before"], report["moved_copies"]) == (None, None)


def test_previous_plan_is_followed_and_compared_with(tmp_path: Path) -> None:
    run(tmp_path, loads(0), out="first.json")
    options = ["--slots", str(SLOTS), "--previous", str(tmp_path / "first.json"), "--json"]
    report = json.loads(run(tmp_path, loads(0) + loads(1) / 4, *options).stdout)
    first, second = read_plan(tmp_path / "first.json"), read_plan(tmp_path / "plan.json")
    assert report["moved_copies"] == count_moves(first, second, EXPERTS) < first.size / 2
    assert report["moved_share"] == report["moved_copies"] / first.size
    assert report["balance_before"]["mean"] < report["balance"]["mean"]


def test_previous_plan_may_be_of_fewer_workers(tmp_path: Path) -> None:
    held = np.tile(np.arange(12), (LAYERS, 1)).tolist()
    (tmp_path / "small.json").write_text(json.dumps({"phy2log": held}))
    result = run(tmp_path, loads(), "--slots", str(SLOTS), "--previous", str(tmp_path / "small.json"))
    assert result.exit_code == 0
    assert (count_replicas(read_plan(tmp_path / "plan.json"), EXPERTS) > 0).all()


def test_groups_stay_on_one_node(tmp_path: Path) -> None:
    run(tmp_path, loads(), "--slots", str(SLOTS), "--nodes", "2", "--groups", "4")
    node_of_slot = np.arange(WORKERS)[None, :, None] * 2 // WORKERS
    nodes = read_plan(tmp_path / "plan.json") // (EXPERTS // 4) * 10 + node_of_slot
    assert all(len(np.unique(nodes[layer])) == 4 for layer in range(LAYERS))


def test_groups_that_nodes_cannot_share_are_planned_over_all(tmp_path: Path) -> None:
    result = run(tmp_path, loads(), "--slots", str(SLOTS), "--nodes", "8", "--groups", "4", "--json")
    assert json.loads(result.stdout)["policy"] == "global"


def test_table_for_people_names_balance_and_moves(tmp_path: Path) -> None:
    run(tmp_path, loads(0), out="first.json")
    result = run(tmp_path, loads(1), "--slots", str(SLOTS), "--previous", str(tmp_path / "first.json"))
    assert "plan in force" in result.stdout
    assert "copies move" in result.stdout


BY_PHASE = ("--slots", "4", "--by-phase")


def phase_loads() -> np.ndarray:
    """Three times as many rows of prefill, of other experts."""
    return np.stack([3 * loads(0), loads(1)])


def test_phases_are_planned_apart_in_proportion_and_as_reported(tmp_path: Path) -> None:
    report = json.loads(run(tmp_path, phase_loads(), *BY_PHASE, "--json").stdout)
    written = json.loads((tmp_path / "plan.json").read_text())
    plan = np.array(written["phy2log"]).reshape(LAYERS, WORKERS, 4)
    # 16 experts in 4 slots each: a phase needs four workers, however few rows it has.
    assert written["phases"] == ["prefill"] * 4 + ["decode"] * 4
    for phase, loads_LE in zip(("prefill", "decode"), phase_loads(), strict=True):
        own = plan[:, [of == phase for of in written["phases"]]]
        assert (count_replicas(own, EXPERTS) > 0).all()
        found, level = report["phases"][phase], balance_of(worker_loads(loads_LE, own))
        assert found["workers"] == own.shape[1]
        assert found["balance"] == pytest.approx({"mean": level.mean(), "worst_layer": level.min()})
        assert found["balance"]["mean"] > found["balance_in_joint_plan"]["mean"]


def test_phases_follow_their_previous_plan(tmp_path: Path) -> None:
    run(tmp_path, phase_loads(), "--slots", "8", "--by-phase", out="first.json")
    swapped = ("--slots", "8", "--by-phase", "--previous", str(tmp_path / "first.json"), "--json")
    report = json.loads(run(tmp_path, phase_loads() * 1.01, *swapped).stdout)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "plan.json"))
    assert first["phases"] == second["phases"]
    assert first["phases"].count("prefill") == 6
    assert report["moved_share"] < 0.1
    assert "copies move" in run(tmp_path, phase_loads(), *swapped[:-1]).stdout


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (loads(), BY_PHASE, r"'--loads': wanted numbers of shape \(2, layers, experts\)"),
        (-phase_loads(), BY_PHASE, r"'--loads': wanted finite loads >= 0"),
        (phase_loads(), ("--slots", "3", "--by-phase"), r"'--workers': wanted 6 workers for each phase"),
        (phase_loads(), (*BY_PHASE, "--groups", "4"), r"'--groups': wanted none with --by-phase"),
        (loads()[0], (), r"'--loads': wanted numbers of shape \(layers, experts\); got shape \(16,\)"),
        (np.array([["a"]]), (), r"'--loads': wanted numbers of shape"),
        (
            np.where(np.arange(EXPERTS) == 5, np.nan, loads()),
            (),
            r"'--loads': .* got nan for layer 0, expert 5",
        ),
        (-loads(), (), r"'--loads': wanted finite loads >= 0"),
        (loads(), ("--slots", "1"), r"'--slots': wanted at least 2: .*; got 1"),
        (loads(), ("--slots", "17"), r"'--slots': wanted at most 16"),
        (loads(), ("--slots", "3", "--nodes", "3"), r"'--nodes': wanted a divisor of --workers 8"),
        (
            loads(),
            ("--slots", "3", "--nodes", "2", "--groups", "6"),
            r"'--groups': wanted a divisor of the 16",
        ),
        (loads(), ("--slots", "9", "--nodes", "2", "--groups", "4"), r"'--slots': wanted at most 8"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, array: np.ndarray, options: tuple[str, ...], message: str
) -> None:
    result = run(tmp_path, array, *options)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "wanted a JSON file"),
        ("{}", 'the key "phy2log"'),
        ('{"phy2log": 3}', "one list per layer"),
        ('{"phy2log": [[0, 1, 2]]}', "wanted 3 layers"),
        ('{"phy2log": [[0, 1], [0, 1], [0, 1]]}', "3 for each worker"),
        ('{"phy2log": [[0, 1, 2], [0, 1, 2], [0, 1, 99]]}', "experts 0 to 15; got 99"),
        ('{"phy2log": [[0, 1, 2], [0, 1, 2], [0, 1, true]]}', "experts 0 to 15; got True"),
    ],
)
def test_broken_previous_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "previous.json").write_text(text)
    result = run(tmp_path, loads(), "--slots", str(SLOTS), "--previous", str(tmp_path / "previous.json"))
    assert isinstance(result.exception, ConfigError)
    assert message in result.exception.message


def test_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loads.npy").write_text("no array")
    arguments = ["--loads", str(tmp_path / "loads.npy"), "--workers", "8", "--slots", "3"]
    result = RUNNER.invoke(APP, [*arguments, "--out", str(tmp_path / "plan.json")])
    assert isinstance(result.exception, ConfigError)
    assert "numpy.save" in result.exception.message


def test_missing_file_is_wrong_usage(tmp_path: Path) -> None:
    arguments = ["--loads", str(tmp_path / "none.npy"), "--workers", "8", "--slots", "3"]
    result = RUNNER.invoke(APP, [*arguments, "--out", str(tmp_path / "plan.json")])
    assert result.exit_code == 2
    assert "--loads" in result.output
