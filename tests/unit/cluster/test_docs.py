"""The reference pages are what the code says now, and say all of it."""

import difflib

import pytest
import typer.main
from pydantic import Field

from cluster import docs
from cluster.cli.app import app
from cluster.config import MorayConfig
from wire.config import FrozenConfig
from wire.metrics import METRICS, Kind, MetricSpec

PAGES = docs.pages()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    committed = (docs.DOCS_DIR / name).read_text()
    changes = difflib.unified_diff(committed.splitlines(), PAGES[name].splitlines(), lineterm="", n=0)
    assert list(changes) == [], "run `python -m cluster.docs`"


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_whole(name: str) -> None:
    """Every row has as many cells as its head: nothing in a text breaks a table."""
    blocks = [block for block in PAGES[name].split("\n\n") if block.startswith("|")]
    widths = [{line.replace("\\|", "").count("|") for line in block.splitlines()} for block in blocks]
    assert blocks
    assert [len(width) for width in widths] == [1] * len(blocks)


@pytest.mark.parametrize("name", PAGES)
def test_no_row_lacks_its_meaning(name: str) -> None:
    rows = [line for line in PAGES[name].splitlines() if line.startswith("|")]
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_metric_is_listed_once() -> None:
    page = PAGES["metrics.md"]
    assert [spec.name for spec in METRICS if page.count(f"| `{spec.name}` |") != 1] == []


def test_metric_row_has_type_labels_and_help() -> None:
    page = docs.metrics_page([MetricSpec("moray_router_x_total", Kind.COUNTER, "All | x.", ("a", "b"))])
    assert "| `moray_router_x_total` | counter | a, b | All \\| x. |" in page
    assert "## Router" in page


def test_every_key_of_the_config_is_listed_once() -> None:
    def keys(value: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for name, below in value.items():
            is_section = isinstance(below, dict) and name != "node_selector"
            found += keys(below, f"{prefix}{name}.") if is_section else [prefix + name]  # type: ignore[arg-type]  # a dict
        return found

    page = PAGES["configuration.md"]
    assert [key for key in keys(MorayConfig().model_dump()) if page.count(f"| `{key}` |") != 1] == []


class Section(FrozenConfig):
    """A section."""

    share: float = Field(0.5, gt=0, le=1)
    """A part of
    one."""


class Whole(FrozenConfig):
    """A config."""

    section: Section = Section(share=0.25)
    """The section."""
    names: dict[str, str] = Field(default_factory=dict)
    """Names."""


def test_configuration_rows_have_bounds_help_and_the_default_of_their_place() -> None:
    page = docs.configuration_page(Whole)
    assert "| `section.share` | float, > 0, <= 1 | `0.25` | A part of one. |" in page
    assert "| `names` | mapping of strings | `{}` | Names. |" in page
    assert "## section\n\nThe section.\n" in page


def test_every_command_and_every_flag_is_listed() -> None:
    page = PAGES["cli.md"]
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # a group, which typer does not export
        sections = page.split("\n## ")
        below = [section for section in sections if section.startswith(f"moray {name}")]
        assert below, name
        flags = [flag for param in command.params for flag in param.opts if flag.startswith("--")]
        assert [flag for flag in flags if flag != "--help" and f"`{flag}`" not in below[0]] == []


def test_flag_row_has_choices_default_and_help() -> None:
    assert (
        "| `--topology` | `in-process` or `cluster` | `in-process` | In this process or as deployed. |"
        in PAGES["cli.md"]
    )
    assert "| `--tokens` | path | required |" in PAGES["cli.md"]


def test_pages_are_written_where_they_belong(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(docs, "DOCS_DIR", tmp_path)
    docs.main()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == PAGES
    assert capsys.readouterr().out.split() == ["docs/metrics.md", "docs/configuration.md", "docs/cli.md"]
