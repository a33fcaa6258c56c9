"""The curves of a run as a PNG."""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = (
    ("loss on held-out text, nats per token", ("loss", "mtp_loss")),
    ("indexer's KL, nats, sum over layers", ("indexer_loss",)),
    ("share of tokens right, of drafts accepted", ("right_share", "accepted_share")),
    ("expert balance, mean / max rows", ("balance",)),
)


def plot_run(reports: Path, png: Path) -> None:
    """Draws reports.jsonl: four panels over tokens seen."""
    rows = [json.loads(line) for line in reports.read_text().splitlines()]
    tokens = [row["num_tokens"] / 1e6 for row in rows]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for key in keys:
            axes.plot(tokens, [row[key] for row in rows], label=key.replace("_", " "))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(png, dpi=80)
