"""The reference pages in docs/ that are made from the code, so that they cannot fall behind it.

    python -m cluster.docs        writes docs/metrics.md, docs/configuration.md and docs/cli.md

All three are committed; tests/unit/cluster/test_docs.py makes them again and compares.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.cli.app import app
from cluster.config import MorayConfig
from wire.metrics import METRICS, MetricSpec

DOCS_DIR = Path(__file__).resolve().parent.parent / "docs"

_MADE_BY = "<!-- Made by `python -m cluster.docs`; change the code, not this page. -->"
_VARIABLES = (
    (
        "`MORAY_ADDRESS`",
        "host:port of the router to ask; without it the cluster noted last, then 127.0.0.1:50051.",
    ),
    ("`MORAY_CACHE_DIR`", "Where models in the box are kept; ~/.cache/moray without it."),
    ("`MORAY_STATE_FILE`", "Where the newest cluster of this user is noted."),
    ("`RAY_ADDRESS`", "Ray cluster to join; without it `moray up` starts one on this host."),
    ("`MORAY_POD_IP`", "Address that `moray router` tells Prometheus; set by Kubernetes."),
)
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "max_length": "at most {} long"}
"""Constraints of a field that are worth a word, by their pydantic name."""


def pages() -> dict[str, str]:
    """File name in docs/ -> its text."""
    return {
        "metrics.md": metrics_page(METRICS),
        "configuration.md": configuration_page(MorayConfig),
        "cli.md": cli_page(app),
    }


def metrics_page(metrics: Sequence[MetricSpec]) -> str:
    """Every metric, in one table a role."""
    lines = [
        *_title("Metrics"),
        "Every process serves `/metrics` in Prometheus' text format; the router's `/sd` lists all of them",
        "for Prometheus' HTTP service discovery. They are declared in `wire/metrics.py`.",
    ]
    by_role: dict[str, list[MetricSpec]] = {}
    for spec in metrics:
        by_role.setdefault(spec.name.split("_")[1], []).append(spec)
    for role, specs in by_role.items():
        rows = [(f"`{s.name}`", s.kind.value, ", ".join(s.labels), s.help) for s in specs]
        lines += ["", f"## {role.capitalize()}", "", *_table(("name", "type", "labels", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def configuration_page(root: type[BaseModel]) -> str:
    """Every key of the config, in one table a section."""
    lines = [
        *_title("Configuration"),
        "One YAML file, `moray up --config FILE`; flags win over it. The Helm chart takes the same keys",
        "below `config`. An unknown key, a wrong type or a value out of range is refused by name; what is",
        "left out has the default below. The types are in `cluster/config.py`, `router/config.py` and",
        "`workers/config.py`.",
    ]
    for section, about, fields in _sections(root):
        rows = [
            (f"`{section}{name}`", type_text(field), f"`{default}`", _sentence(field))
            for name, field, default in fields
        ]
        title = section.rstrip(".") or "Top level"
        lines += ["", f"## {title}", "", about, "", *_table(("key", "type", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def cli_page(cli: typer.Typer) -> str:
    """Every command with its arguments and flags."""
    lines = [
        *_title("The command line"),
        "Exit codes: 0 done, 1 failed, 2 wrong usage (flags, config). What failed is one line on stderr.",
        "",
        *_table(("variable", "meaning"), _VARIABLES),
    ]
    for name, command in _commands(typer.main.get_command(cli), "moray"):
        params = [param for param in command.params if param.name != "help" and not param.hidden]
        arguments = [f"[{p.name}]" if not p.required else p.name for p in params if _is_argument(p)]
        rows = [(_flag(p), _kind(p), _default_of(p), p.help or "") for p in params]
        lines += ["", f"## {' '.join([name, *arguments])}", "", command.help or ""]
        lines += ["", *_table(("parameter", "type", "default", "meaning"), rows)] if rows else []
    return "\n".join(lines) + "\n"


def type_text(field: FieldInfo) -> str:
    """A field's type for people: "int, >= 0, <= 65535"; the choices of a Literal."""
    bounds = [
        text.format(f"{value:g}" if isinstance(value, float) else value)
        for item in field.metadata
        for name, text in _BOUNDS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return ", ".join([_annotation_text(field.annotation), *bounds])


def _annotation_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        return "mapping of strings"
    return str(getattr(annotation, "__name__", annotation))


_Fields = list[tuple[str, FieldInfo, str]]
"""Name, field and default of each key of a section."""


def _sections(root: type[BaseModel]) -> Iterator[tuple[str, str, _Fields]]:
    """(prefix, what it is, its plain fields) of the config and of every section below it."""
    defaults = root()
    yield "", "What belongs to no section.", _plain_fields(root, defaults)
    for name, field in root.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield f"{name}.", _sentence(field), _plain_fields(section, getattr(defaults, name))


def _plain_fields(section: type[BaseModel], defaults: BaseModel) -> _Fields:
    """Fields that are no sections, each with its default here: that of `both.replicas` is its own."""
    return [
        (name, field, json.dumps(getattr(defaults, name)))
        for name, field in section.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with its full name; typer's own types, which it does not export."""
    children: Mapping[str, Any] = getattr(command, "commands", {})
    if not children:
        yield name, command
    for child, below in children.items():
        yield from _commands(below, f"{name} {child}")


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _flag(param: Any) -> str:
    return f"`{param.name}`" if _is_argument(param) else ", ".join(f"`{name}`" for name in param.opts)


def _kind(param: Any) -> str:
    if getattr(param, "is_flag", False):
        return "flag"
    described = param.type_descriptor
    choices = [f"`{getattr(choice, 'value', choice)}`" for choice in described.choices or ()]
    text = " or ".join(choices) or described.annotation.__name__.lower()
    bounds = [
        sign.format(bound)
        for sign, bound in ((">= {}", param.min), ("<= {}", param.max))
        if bound is not None
    ]
    return ", ".join([text, *bounds])


def _default_of(param: Any) -> str:
    if param.required:
        return "required"
    default = getattr(param.default, "value", param.default)
    is_plain = default is None or default is False or default == ""
    return "" if is_plain else f"`{default}`"


def _title(title: str) -> list[str]:
    return [f"# {title}", "", _MADE_BY, ""]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def main() -> None:
    """Write every page and say where."""
    for name, text in pages().items():
        path = DOCS_DIR / name
        path.write_text(text)
        sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main()
