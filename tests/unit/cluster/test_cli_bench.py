"""`moray bench throughput` on the model in the box: what scripts read, what people see, what is refused."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from cluster.bench import limits, throughput
from cluster.bench.limits import MachineLimits
from cluster.bench.streams import Rate
from cluster.bench.throughput import Row, ThroughputReport, ThroughputSpec
from cluster.cli import app as command_line
from cluster.cli.dtype import DTYPES
from model.precision import PRECISIONS
from model.profile import PARTS

Bench = Callable[..., tuple[int, str, str]]
SMALL = ("--prefill-tokens", "24", "--step-tokens", "16", "--prompt-tokens", "7", "--new-tokens", "40")
"""Two steps of prefill; enough new tokens that requests decode together however busy the machine is."""
WIDTH = 80


def run_command(patch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Runs `moray bench throughput` in this process: exit code, stdout, stderr."""
    patch.setattr(limits, "_MEMORY_BYTES", 1 << 20)
    patch.setattr(limits, "_SIDE", 64)
    patch.setattr(sys, "argv", ["moray", "bench", "throughput", *arguments])
    patch.setenv("COLUMNS", str(WIDTH))
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as error,
        pytest.raises(SystemExit) as ended,
    ):
        command_line.main()
    return int(ended.value.code or 0), out.getvalue(), error.getvalue()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return lambda *arguments: run_command(monkeypatch, *arguments)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """One precision: prefill and two batches, with their profiles."""
    flags = ["--batches", "1,3", "--repeats", "1", "--threads", "1", "--dtype", "int8", "--profile", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        code, out, error = run_command(patch, *SMALL, *flags)
    assert code == 0, error
    found: dict[str, Any] = json.loads(out)
    return found


MACHINE = MachineLimits(memory_bytes_per_s=1e11, float32_flops_per_s=9e12, int8_ops_per_s=9e13)


def made_up(spec: ThroughputSpec) -> ThroughputReport:
    """Wide numbers for every row that a spec asks for."""
    rows = tuple(
        Row(
            topology=topology,
            dtype=dtype,
            phase=phase,
            batch=batch,
            tokens_per_s=Rate(median=23456.7, lowest=12345.6, highest=34567.8),
            limits=MACHINE,
            bound_tokens_per_s=234567.8,
            overlapped_bound_tokens_per_s=345678.9,
            step_ms=dict.fromkeys((*PARTS, "python"), 1234.5) if spec.has_profile else None,
            of_in_process=0.875 if len(spec.topologies) > 1 and topology == "cluster" else None,
        )
        for topology in spec.topologies
        for dtype in spec.dtypes
        for phase, batch in (("prefill", 1), *(("decode", batch) for batch in spec.batches))
    )
    return ThroughputReport(spec=spec, kernels="avx512", rows=rows)


@pytest.fixture
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of measuring, numbers that are made up."""
    monkeypatch.setattr(throughput, "measure_throughput", lambda spec, **_: made_up(spec))


def test_dtypes_are_those_of_the_model() -> None:
    assert DTYPES == PRECISIONS


def test_json_has_its_sections(report: dict[str, Any]) -> None:
    assert {name: set(section) for name, section in report.items() if name != "rows"} == {
        "spec": set(ThroughputSpec.__dataclass_fields__) | {"seed"},
        "machine": {"cpus", "architecture", "python", "torch", "kernels"},
    }
    assert isinstance(report["rows"], list)


def test_json_repeats_what_was_asked(report: dict[str, Any]) -> None:
    asked = {
        "model": "nano",
        "dtypes": ["int8"],
        "topologies": ["in-process"],
        "batches": [1, 3],
        "prefill_tokens": 24,
        "prompt_tokens": 7,
        "new_tokens": 40,
        "step_tokens": 16,
        "num_threads": 1,
        "repeats": 1,
        "has_profile": True,
        "seed": throughput.SEED,
    }
    assert {name: report["spec"][name] for name in asked} == asked


def test_json_names_kernels_and_rates_of_the_machine(report: dict[str, Any]) -> None:
    assert report["machine"]["kernels"] in {"torch", "plain", "avx2", "avx512"}
    for row in report["rows"]:
        assert set(row["limits"]) == {"memory_bytes_per_s", "float32_flops_per_s", "int8_ops_per_s"}
        assert min(row["limits"].values()) > 0


def test_json_has_prefill_and_every_batch(report: dict[str, Any]) -> None:
    assert [(row["phase"], row["batch"]) for row in report["rows"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("decode", 3),
    ]
    assert {(row["topology"], row["dtype"]) for row in report["rows"]} == {("in-process", "int8")}


@pytest.mark.parametrize("row_idx", range(3))
def test_rates_of_a_row_fit_together(report: dict[str, Any], row_idx: int) -> None:
    row = report["rows"][row_idx]
    rate, bound = row["tokens_per_s"], row["bound_tokens_per_s"]
    assert 0 < rate["lowest"] <= rate["median"] <= rate["highest"]
    assert 0 < bound <= row["overlapped_bound_tokens_per_s"]
    assert row["share_of_bound"] == rate["median"] / bound


@pytest.mark.parametrize("row_idx", range(3))
def test_profile_of_a_row_has_every_part(report: dict[str, Any], row_idx: int) -> None:
    step_ms = report["rows"][row_idx]["step_ms"]
    assert list(step_ms) == [*PARTS, "python"]
    # No prompt of these reaches the indexer's selection, and its keys are part of attention's first product.
    assert step_ms.pop("indexer") == 0
    assert min(step_ms.values()) > 0


def test_table_of_one_precision_fits_the_terminal(bench: Bench) -> None:
    code, out, error = bench(*SMALL, "--batches", "2", "--repeats", "2", "--threads", "1", "--dtype", "fp8")
    assert code == 0, error
    assert [
        part
        for part in ("nano: in-process, fp8, threads 1, kernels ", "prefill", "decode 2")
        if part not in out
    ] == []
    assert "topology" not in out
    assert max(map(len, out.splitlines())) <= WIDTH


def test_no_prefill_is_measured_where_none_is_asked(bench: Bench) -> None:
    flags = ["--batches", "1", "--repeats", "1", "--threads", "1", "--prefill-tokens", "0", "--json"]
    code, out, error = bench(*SMALL, *flags)
    assert code == 0, error
    assert [(row["phase"], row["step_ms"]) for row in json.loads(out)["rows"]] == [("decode", None)]


def test_stdout_is_the_reports_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says on stdout that a worker died."""

    def measure(spec: ThroughputSpec, **_: Any) -> ThroughputReport:
        sys.stdout.write("(raylet) A worker died\n")
        return made_up(spec)

    monkeypatch.setattr(throughput, "measure_throughput", measure)
    code, out, error = bench("--json")
    assert (code, error) == (0, "(raylet) A worker died\n")
    assert set(json.loads(out)) == {"spec", "machine", "rows"}


@pytest.mark.usefixtures("not_measured")
def test_widest_tables_are_not_cut(bench: Bench) -> None:
    code, out, error = bench(
        "--topology", "both", "--dtype", "auto,bfloat16", "--batches", "1,32", "--profile"
    )
    assert code == 0, error
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= WIDTH
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    assert ["in-process", "bfloat16", "decode 32", "23457", "12346-34568", "234568", "10.0%"] in lines
    assert ["decode 32", *["1234"] * len(PARTS), "1234"] in lines


@pytest.mark.usefixtures("not_measured")
def test_columns_that_always_say_the_same_are_left_out(bench: Bench) -> None:
    _, out, _ = bench("--topology", "both", "--dtype", "int8", "--batches", "1")
    header = next(line for line in out.splitlines() if "tok/s" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "topology",
        "phase",
        "tok/s",
        "range",
        "bound",
        "share",
    ]
    assert "nano: int8, " in out


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--dtype", "float16"),
        ("--dtype", "int8,"),
        ("--dtype", ""),
        ("--batches", "0"),
        ("--batches", "1,,2"),
        ("--batches", "-1"),
        ("--batches", "many"),
        ("--batches", ""),
    ],
)
def test_wrong_list_is_a_usage_error_that_names_the_flag(bench: Bench, flag: str, given: str) -> None:
    code, out, error = bench(f"{flag}={given}")
    assert (code, out) == (2, "")
    assert error.startswith(f"error: config field '{flag}': wanted ")
    assert error.endswith(f"; got {given}\n")


@pytest.mark.usefixtures("not_measured")
def test_lists_may_have_spaces(bench: Bench) -> None:
    code, out, error = bench("--dtype", "fp8, int8", "--batches", "1, 2", "--json")
    assert code == 0, error
    spec = json.loads(out)["spec"]
    assert (spec["dtypes"], spec["batches"]) == (["fp8", "int8"], [1, 2])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--prefill-tokens", "2048"], ["'--prefill-tokens'", "within the context of 2048; got 2049"]),
        (["--prompt-tokens", "2000", "--new-tokens", "49"], ["'--prompt-tokens'", "; got 2049"]),
        (["--threads", "5000"], ["'num_threads'", "got 5000"]),
        (["--model", "no-such-model"], ["'model'", "got no-such-model"]),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, flags: list[str], parts: list[str]
) -> None:
    monkeypatch.setattr(throughput, "choose_kernels", None)
    code, out, error = bench("--prefill-tokens", "0", *flags)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert [part for part in parts if part not in error] == []


def test_too_few_new_tokens_are_a_usage_error(bench: Bench) -> None:
    """Of two tokens each, both requests have the first before there is a step of both."""
    flags = ["--new-tokens", "2", "--batches", "2", "--threads", "1", "--prefill-tokens", "0"]
    code, out, error = bench(*SMALL, *flags)
    assert (code, out) == (2, "")
    assert "'--new-tokens'" in error.splitlines()[-1]


@pytest.mark.usefixtures("not_measured")
def test_cluster_is_compared_with_one_process_of_the_same_run(bench: Bench) -> None:
    _, out, _ = bench("--topology", "both", "--dtype", "int8", "--batches", "32")
    assert [line for line in out.splitlines() if "of one process" in line] == [
        "cluster, int8, prefill: 0.88 of one process",
        "cluster, int8, decode 32: 0.88 of one process",
    ]
    _, out, _ = bench("--topology", "cluster", "--dtype", "int8", "--batches", "32")
    assert "of one process" not in out
