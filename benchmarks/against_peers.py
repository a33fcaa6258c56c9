"""Moray against llama.cpp and transformers on one model, in one run, in turns: ratios of medians.

    .venv/bin/python benchmarks/against_peers.py --model BENCH_1B --llama LLAMA_CPP/build/bin --gguf Q8_0.gguf
        [--hf-python VENV/bin/python] [--rounds 3] [--json]

BENCH_1B is a checkpoint of `moray checkpoint make --size bench-1b`; llama.cpp reads its conversion to GGUF.
Each round measures every program once, alone and in a process of its own. Prefill is one prompt of 2,048
tokens; decode is 64 new tokens of 256-token prompts.
"""

import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 2048, 256, 64
BATCHES = (1, 8, 32)
RUN_S = 1800
HF_PREFILL = """
import sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm")
ids = torch.randint(3, model.config.vocab_size, (1, int(sys.argv[3])))
with torch.inference_mode():
    model(ids[:, :256], logits_to_keep=1)
    began_s = time.perf_counter()
    model(ids, logits_to_keep=1)
print("RATE", ids.shape[1] / (time.perf_counter() - began_s))
"""

Rates = dict[str, float]
"""Measurement -> tokens per second."""


def main(  # noqa: PLR0913, PLR0917 - one parameter a flag
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    llama: Annotated[Path | None, typer.Option(exists=True, help="Folder of llama.cpp's programs.")] = None,
    gguf: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None,
    hf_python: Annotated[Path | None, typer.Option(help="A Python that has transformers.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Runs the rounds and shows every ratio."""
    if model is None or llama is None or gguf is None:
        print("nothing to compare with: --model, --llama and --gguf are needed (--help)")
        return
    programs: dict[str, Callable[[], Rates]] = {
        "moray int8": lambda: run_moray(model, "int8", threads),
        "llama q8_0": lambda: run_llama(llama, gguf, threads),
    }
    if hf_python is not None:
        programs["moray float32"] = lambda: run_moray(model, "float32", threads, is_prefill_only=True)
        programs["transformers float32"] = lambda: run_transformers(hf_python, model, threads)
    rates: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in programs}
    for round_idx in range(rounds):
        for name, run in programs.items():
            for measurement, rate in run().items():
                rates[name][measurement].append(rate)
                print(f"round {round_idx} {name} {measurement}: {rate:.1f} tok/s", file=sys.stderr)
    print(json.dumps(rates)) if as_json else show(rates)


def run_moray(model: Path, dtype: str, threads: int, *, is_prefill_only: bool = False) -> Rates:
    """One run of `moray bench throughput`, with the bound and the share of it reached."""
    batches = "1" if is_prefill_only else ",".join(map(str, BATCHES))
    flags = ["--model", str(model), "--dtype", dtype, "--threads", str(threads), "--repeats", "1"]
    flags += ["--prefill-tokens", str(PREFILL_TOKENS), "--prompt-tokens", str(PROMPT_TOKENS)]
    flags += ["--new-tokens", str(NEW_TOKENS), "--batches", batches, "--json"]
    report = json.loads(run([str(Path(sys.executable).parent / "moray"), "bench", "throughput", *flags]))
    rates: Rates = {}
    for row in report["rows"]:
        name = "prefill" if row["phase"] == "prefill" else f"decode {row['batch']}"
        rates[name] = row["tokens_per_s"]["median"]
        rates[f"{name}, share of bound"] = row["share_of_bound"]
    if is_prefill_only:
        return {name: rate for name, rate in rates.items() if name.startswith("prefill")}
    return rates


def run_llama(programs: Path, gguf: Path, threads: int) -> Rates:
    """One prefill by llama-bench, one decode of each batch by llama-batched-bench."""
    common = ["-m", str(gguf), "-t", str(threads)]
    prefill = run(
        [
            str(programs / "llama-bench"),
            *common,
            "-p",
            str(PREFILL_TOKENS),
            "-n",
            "0",
            "-r",
            "1",
            "-o",
            "json",
        ]
    )
    rates = {"prefill": json.loads(prefill[prefill.index("[") :])[0]["avg_ts"]}
    shape = ["-c", "16384", "-b", "2048", "-ub", "512", "-npp", str(PROMPT_TOKENS), "-ntg", str(NEW_TOKENS)]
    batches = ",".join(map(str, BATCHES))
    table = run(
        [str(programs / "llama-batched-bench"), *common, "-tb", str(threads), *shape, "-npl", batches]
    )
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(r"\d+", cells[0]):
            rates[f"decode {cells[2]}"] = float(cells[7])
    return rates


def run_transformers(python: Path, model: Path, threads: int) -> Rates:
    """One prefill by transformers in FP32, its faster attention and experts."""
    arguments = [str(model), str(threads), str(PREFILL_TOKENS)]
    output = run([str(python), "-c", HF_PREFILL, *arguments])
    return {"prefill": float(output.rsplit("RATE", 1)[1])}


def run(command: list[str]) -> str:
    """What a program printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def show(rates: dict[str, dict[str, list[float]]]) -> None:
    """Medians, and ratios of Moray to the peer of the same measurement."""
    table = Table("measurement", "moray", "peer", "moray / peer", "share of bound")
    for ours, peer in (("moray int8", "llama q8_0"), ("moray float32", "transformers float32")):
        for measurement, peer_rates in rates.get(peer, {}).items():
            own, other = statistics.median(rates[ours][measurement]), statistics.median(peer_rates)
            share = statistics.median(rates[ours][f"{measurement}, share of bound"])
            table.add_row(
                f"{ours} {measurement} against {peer}",
                f"{own:.1f}",
                f"{other:.1f}",
                f"{own / other:.2f}x",
                f"{share:.0%}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
