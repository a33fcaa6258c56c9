"""The plot of a load: a PNG of any outcomes, refused before the load where it could not be drawn."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.bench.load import plot
from cluster.bench.load.plot import check_can_plot, plot_load
from cluster.bench.load.report import make_report
from cluster.bench.load.types import Objectives, Outcome
from wire.errors import ConfigError

DONE = Outcome(due_s=0, sent_s=0, ended_s=0.4, token_s=(0.1, 0.2, 0.4), num_prompt_tokens=30)
REFUSED = Outcome(due_s=1, sent_s=1, ended_s=1.05, is_refused=True, error="Overloaded: full")


@pytest.mark.parametrize("outcomes", [(DONE, REFUSED), (REFUSED,), ()], ids=["some", "refused", "none"])
def test_any_load_becomes_a_png(outcomes: Sequence[Outcome], tmp_path: Path) -> None:
    png = tmp_path / "load"
    report = make_report(outcomes, objectives=Objectives(ttft_ms=50))
    check_can_plot(png)
    plot_load(outcomes, report, png, title="a load")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"moray\[plots\]"):
        check_can_plot(tmp_path / "load.png")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--plot"):
        check_can_plot(tmp_path / "nowhere" / "load.png")
