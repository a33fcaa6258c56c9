"""The course of a load as a PNG."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.bench.load.report import LoadReport, running_steps, waiting_steps
from cluster.bench.load.types import Outcome
from wire.errors import ConfigError

_NUM_BINS = 60


def check_can_plot(png: Path) -> None:
    """Refuses a plot before the load runs for it.

    Raises:
        ConfigError: matplotlib is not installed, or there is no such folder.
    """
    if find_spec("matplotlib") is None:
        hint = "pip install 'moray[plots]'"
        raise ConfigError(field="--plot", wanted="matplotlib installed", given="none", hint=hint)
    if not png.parent.is_dir():
        raise ConfigError(field="--plot", wanted="a file in a folder that is there", given=str(png))


def plot_load(outcomes: Sequence[Outcome], report: LoadReport, png: Path, *, title: str) -> None:
    """Draws four panels: time to the first token, gaps between tokens, requests and tokens over time."""
    # Optional: the load itself runs without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    (ttft, gaps), (queue, tokens) = figure.subplots(2, 2)
    done = [outcome for outcome in outcomes if outcome.is_done]
    limits = report.objectives
    _share(ttft, [1e3 * o.ttft_s for o in done], "time to the first token, ms", limits.ttft_ms)
    _share(gaps, [1e3 * gap for o in done for gap in o.gaps_s], "between two tokens, ms", limits.itl_ms)
    for steps, label in ((waiting_steps(outcomes), "no token yet"), (running_steps(outcomes), "answering")):
        queue.step([s for s, _ in steps], [n for _, n in steps], where="post", label=label)
    refused = [o.sent_s for o in outcomes if o.is_refused]
    queue.plot(refused, [0] * len(refused), "x", label="refused")
    queue.set_title("requests", fontsize=10)
    queue.set_xlabel("s")
    queue.legend(fontsize=8)
    moments = [moment for o in outcomes for moment in o.token_s]
    bin_s = max(report.duration_s, 1e-9) / _NUM_BINS
    tokens.hist(
        moments, bins=_NUM_BINS, range=(0, max(report.duration_s, 1e-9)), weights=[1 / bin_s] * len(moments)
    )
    tokens.set_title("new tokens / s", fontsize=10)
    tokens.set_xlabel("s")
    for axes in (ttft, gaps, queue, tokens):
        axes.grid(alpha=0.3)
    figure.savefig(png, format="png", dpi=100)


def _share(axes: Any, values: list[float], title: str, limit: float) -> None:
    """The share of values that are not above x."""
    if values:
        axes.ecdf(values)
    if limit:
        axes.axvline(limit, linestyle="--", color="grey")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("share")
