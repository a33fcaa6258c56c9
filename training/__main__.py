"""`python -m training --out DIR`: trains moray-nano and writes its checkpoint.

A run that was stopped goes on from its last report when the same command is given again.
"""

import argparse
import json
import os
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.sizes import hf_config
from training.config import shipped_run, smoke_run
from training.data.generator import items
from training.data.types import document_text
from training.export import export_checkpoint
from training.plots import plot_run
from training.tokenizer import train_tokenizer
from training.trainer import Report, Trainer

_TOKENIZER_DOCUMENTS = 12_000


def main() -> None:
    """Trains, or goes on; prints a line per report."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="work folder; the checkpoint goes to OUT/checkpoint"
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that everything works")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, smoke=arguments.smoke)


def train(work_dir: Path, *, smoke: bool = False) -> None:
    """One run in a folder: tokenizer.json, state.pt, reports.jsonl, curves.png, checkpoint/ at the end."""
    config = smoke_run() if smoke else shipped_run()
    hf = hf_config("nano", dtype="fp8")
    model_config = ModelConfig.from_hf(hf)
    tokenizer = _tokenizer(work_dir / "tokenizer.json", num_tokens=model_config.vocab_size, smoke=smoke)
    trainer = Trainer(model_config, config, tokenizer)
    if (work_dir / "state.pt").exists():
        trainer.resume(work_dir / "state.pt")
    reports = work_dir / "reports.jsonl"

    def on_report(report: Report) -> None:
        with reports.open("a") as file:
            file.write(json.dumps(asdict(report)) + "\n")
        print(  # noqa: T201 - this module is a command
            f"{report.stage:8} step {report.step}/{config.num_steps}  {report.elapsed_s / 60:.1f} min  "
            f"loss {report.loss:.3f}  mtp {report.mtp_loss:.3f}  indexer {report.indexer_loss:.3f}  "
            f"right {report.right_share:.3f}  drafts {report.accepted_share:.3f}  "
            f"balance {report.balance:.2f}",
            flush=True,
        )

    trainer.run(on_report, save_to=work_dir / "state.pt")
    plot_run(reports, work_dir / "curves.png")
    export_checkpoint(work_dir / "checkpoint", trainer.weights, hf=hf, tokenizer=tokenizer, dtype="fp8")


def _tokenizer(path: Path, *, num_tokens: int, smoke: bool) -> Tokenizer:
    if not path.exists():
        num_documents = 600 if smoke else _TOKENIZER_DOCUMENTS
        texts = (document_text(item) for item in islice(items(seed=0, held_out=False), num_documents))
        train_tokenizer(texts, num_tokens=num_tokens).save(str(path))
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    main()
