"""Parts of the benchmark scripts: what they refuse, and how they read what other programs print."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import against_peers, long_context, precision, replica_bias
from benchmarks.handover_by_layer import Came, Pull, compare, last_row_s

RUNNER = CliRunner()
BATCHED = """
main: n_kv_max = 16384, n_batch = 2048, n_ubatch = 512

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   256 |     64 |    1 |    320 |    1.000 |   256.00 |    2.000 |    32.00 |    3.000 |   106.67 |
|   256 |     64 |   32 |  10240 |    9.000 |   910.22 |    8.000 |   256.00 |   17.000 |   602.35 |
"""
"""What llama-batched-bench of llama.cpp prints, shortened."""


def run_main(main: Callable[..., None], *arguments: str) -> tuple[int, str]:
    """A script's exit code and all that it wrote."""
    app = typer.Typer()
    app.command()(main)
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with programs that print what llama.cpp's do, and their arguments to a file."""
    outputs = {"llama-bench": json.dumps([{"avg_ts": 123.5}]), "llama-batched-bench": BATCHED}
    for name, output in outputs.items():
        (tmp_path / f"{name}.out").write_text(output)
        program = tmp_path / name
        program.write_text('#!/bin/sh\necho "$@" > "$0.args"\ncat "$0.out"\n')
        program.chmod(0o755)
    return tmp_path


def test_peers_without_a_model_say_what_is_needed() -> None:
    code, output = run_main(against_peers.main)
    assert code == 0
    assert output.startswith("nothing to compare with: --model, --llama and --gguf are needed")


def test_llama_is_asked_for_the_same_and_its_tables_are_read(llama: Path) -> None:
    rates = against_peers.run_llama(llama, Path("q8.gguf"), 2)
    assert rates == {"prefill": 123.5, "decode 1": 32.0, "decode 32": 256.0}
    assert (llama / "llama-bench.args").read_text().startswith("-m q8.gguf -t 2 -p 2048 -n 0 ")
    assert "-npp 256 -ntg 64 -npl 1,8,32" in (llama / "llama-batched-bench.args").read_text()


def test_moray_is_asked_for_the_same_and_its_report_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def row(phase: str, batch: int, rate: float) -> dict[str, Any]:
        return {"phase": phase, "batch": batch, "tokens_per_s": {"median": rate}, "share_of_bound": 0.5}

    def run(command: list[str]) -> str:
        asked.extend(command)
        return json.dumps({"rows": [row("prefill", 1, 200.0), row("decode", 8, 50.0)]})

    monkeypatch.setattr(against_peers, "run", run)
    assert against_peers.run_moray(Path("m"), "int8", 2) == {
        "prefill": 200.0,
        "prefill, share of bound": 0.5,
        "decode 8": 50.0,
        "decode 8, share of bound": 0.5,
    }
    assert asked[1:5] == ["bench", "throughput", "--model", "m"]
    only_prefill = against_peers.run_moray(Path("m"), "float32", 2, is_prefill_only=True)
    assert only_prefill == {"prefill": 200.0, "prefill, share of bound": 0.5}


def test_program_that_fails_is_named_with_its_last_words() -> None:
    with pytest.raises(SystemExit, match=r"sh -c echo no such model >&2; exit 3 failed:\nno such model"):
        against_peers.run(["sh", "-c", "echo no such model >&2; exit 3"])


def test_peers_are_compared_by_ratios_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    against_peers.show(
        {
            "moray int8": {"prefill": [90.0, 150.0, 110.0], "prefill, share of bound": [0.25, 0.75, 0.5]},
            "llama q8_0": {"prefill": [100.0, 80.0, 10.0]},
        }
    )
    output = capsys.readouterr().out
    assert [part for part in ("110.0", "80.0", "1.38x", "50%") if part not in output] == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--long", "2001"], "2049 tokens, 48 new ones among them; nano has 2048"),
        (["--dtype", "float16"], "--dtype"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_long_context_refuses(arguments: list[str], part: str) -> None:
    code, output = run_main(long_context.main, *arguments)
    assert code == 2
    assert part in output


def test_precision_refuses_an_unknown_one() -> None:
    code, output = run_main(precision.main, "--dtypes", "int8,float16")
    assert code == 2
    assert "wanted some of auto, float32, bfloat16, fp8, int8; got int8,float16" in output


def test_divergence_is_that_of_the_two_distributions() -> None:
    wanted = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log() + 7
    got = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log() - 3
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert precision.divergence(wanted, got).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_accuracy_is_a_row_of_the_table() -> None:
    row = precision.Accuracy("fp8", "int8", 0.975, 0.0123, 0.001, 0.51, 2.2)
    assert list(precision.markdown([row]))[2:] == ["| fp8 | int8 | 97.5% | 0.012 | 0.001 | 0.51 | 2.2 |"]


def test_ways_to_choose_replicas_place_every_row_where_its_expert_lives() -> None:
    case = replica_bias.Case(num_experts=16, num_workers=4, num_slots=6, num_rows=30)
    popularity_E = np.arange(1.0, 17) ** -replica_bias.ZIPF_EXPONENT
    routes = replica_bias.place(case, popularity_E)
    batch = replica_bias.draw_batch(case, popularity_E, np.random.default_rng(1))
    held = {(replica.expert_idx, replica.worker_idx) for replica in routes.replicas}
    assert [len(set(ids)) for ids in batch.expert_idx_A.reshape(30, -1).tolist()] == [replica_bias.TOP_K] * 30
    for _, choose in replica_bias.WAYS:
        worker_A = choose(routes, batch)
        assert set(zip(batch.expert_idx_A.tolist(), worker_A.tolist(), strict=True)) <= held


def test_levels_are_what_waits_and_what_comes() -> None:
    assert replica_bias.max_over_mean(np.array([0, 0, 1]), np.array([1.0, 1.0, 1.0])) == 1.5


def test_frame_behind_one_that_has_the_link_waits_for_it() -> None:
    frames = [Came(0.0, 4, 0), Came(1.0, 10, 0)]
    assert last_row_s(frames, 1.0) == 14.0
    assert last_row_s(frames, math.inf) == 1.0


def test_handover_after_the_last_layer_is_the_computing_and_then_the_rows() -> None:
    """Two layers of 1 s and 125 bytes each; rows that are there take 10 ms a layer, the last page besides."""
    layered = Pull(frames=(Came(1.0, 125, 0), Came(2.0, 125, 0)), token_s=2.0)
    without = Pull(frames=(), token_s=1.9)
    again = Pull(frames=(Came(0.51, 125, 0), Came(0.52, 125, 0), Came(0.9, 9, 112)), token_s=1.0)
    pulled = [(layered, without, again)]
    loopback, slow = (compare(pulled, gbit=gbit) for gbit in (math.inf, 1e-6))
    assert loopback.layer_by_layer_ms == 2000
    assert loopback.after_the_last_ms == pytest.approx(1920)
    assert slow.layer_by_layer_ms == pytest.approx(3000)
    assert slow.after_the_last_ms == pytest.approx(3910)
