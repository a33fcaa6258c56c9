"""Every source file keeps the house rules, and every rule catches what breaks it."""

import functools
import textwrap
from collections.abc import Callable
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import house_rules
import pytest
from house_rules import PACKAGES, ROOT, Finding

Rule = Callable[[str], list[Finding]]

SIZE_RULES = (
    house_rules.check_file_length,
    house_rules.check_function_lengths,
    house_rules.check_parameter_counts,
)
ROOM_RULES = (house_rules.check_no_mutable_globals, house_rules.check_silencers_say_why)


def broken_by(rule: Rule, files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{finding.line}: {finding.message}"
        for path in files
        for finding in rule(path.read_text())
    ]


@pytest.mark.parametrize("rule", SIZE_RULES, ids=lambda rule: rule.__name__)
def test_all_python_keeps(rule: Rule) -> None:
    assert broken_by(rule, house_rules.python_files(*PACKAGES, "benchmarks", "training", "tests")) == []


@pytest.mark.parametrize("rule", ROOM_RULES, ids=lambda rule: rule.__name__)
def test_packages_and_benchmarks_keep(rule: Rule) -> None:
    assert broken_by(rule, house_rules.python_files(*PACKAGES, "benchmarks", "training")) == []


def test_packages_have_no_assert_or_print() -> None:
    may_print = functools.partial(house_rules.check_no_assert_or_print, is_print_allowed=True)
    command_line = house_rules.python_files("cluster/cli")
    others = [path for path in house_rules.python_files(*PACKAGES) if path not in command_line]
    assert broken_by(may_print, command_line) == []
    assert broken_by(house_rules.check_no_assert_or_print, others) == []


def test_command_line_imports_nothing_slow() -> None:
    assert broken_by(house_rules.check_cli_imports, house_rules.python_files("cluster/cli")) == []


def test_no_other_distribution_owns_our_package_names() -> None:
    assert house_rules.check_package_owners(packages_distributions()) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_package_is_imported_from_this_checkout(name: str) -> None:
    spec = find_spec(name)
    assert spec is not None
    assert Path(str(spec.origin)).is_relative_to(ROOT / name)


def function(*, num_lines: int = 2, parameters: str = "") -> str:
    return f"def f({parameters}):\n" + "    x = 1\n" * (num_lines - 1)


def method(*, num_lines: int = 2, parameters: str = "self") -> str:
    return "class A:\n" + textwrap.indent(
        "async " + function(num_lines=num_lines, parameters=parameters), "    "
    )


BREAKS = [
    (house_rules.check_file_length, "x = 1\n" * 501, "501 lines"),
    (house_rules.check_function_lengths, function(num_lines=81), "f: 81 lines"),
    (house_rules.check_function_lengths, method(num_lines=81), "f: 81 lines"),
    (house_rules.check_parameter_counts, function(parameters="a, /, b, c, d, *, e, f, g"), "f: 7 parameters"),
    (house_rules.check_no_mutable_globals, "cache = {}", "mutable module global cache"),
    (house_rules.check_no_mutable_globals, "seen: set[int] = set()", "mutable module global seen"),
    (house_rules.check_no_mutable_globals, "names = [x for x in y]", "mutable module global names"),
    (
        house_rules.check_no_mutable_globals,
        "_LOCK = threading.Lock()",
        "mutable module global _LOCK",
    ),
    (house_rules.check_no_mutable_globals, "if a:\n    b = []", "mutable module global b"),
    (house_rules.check_no_mutable_globals, "A = {}\ndef f():\n    A[1] = 2", "A is a module's constant"),
    (house_rules.check_no_mutable_globals, "A = {}\ndel A[1][2]", "A is a module's constant"),
    (
        house_rules.check_no_mutable_globals,
        "_A = []\ndef f():\n    _A.append(2)",
        "_A is a module's constant",
    ),
    (house_rules.check_no_mutable_globals, "A = [1]\nA += [2]", "A is a module's constant"),
    (house_rules.check_no_mutable_globals, "def f():\n    global a\n    a = 1", "global statement"),
    (house_rules.check_no_assert_or_print, "assert x", "assert outside tests"),
    (house_rules.check_no_assert_or_print, "print(x)", "print outside the command line"),
    (house_rules.check_cli_imports, "import torch", "imports torch at load"),
    (house_rules.check_cli_imports, "from ray.util import state", "imports ray.util at load"),
    (house_rules.check_cli_imports, "try:\n    import model.loader\nexcept E: pass", "imports model.loader"),
    (house_rules.check_cli_imports, "class A:\n    from workers.expert import x", "imports workers.expert"),
    (house_rules.check_silencers_say_why, "x = 1  # noqa", "wanted a code and a reason"),
    (house_rules.check_silencers_say_why, "x = 1  # noqa: E501", "wanted a code and a reason"),
    (house_rules.check_silencers_say_why, "x = 1  # type: ignore[misc]", "wanted a code and a reason"),
]


@pytest.mark.parametrize(("rule", "source", "message"), BREAKS)
def test_rule_catches(rule: Rule, source: str, message: str) -> None:
    findings = rule(source)
    assert len(findings) == 1
    assert message in findings[0].message


KEEPS = [
    (house_rules.check_file_length, "x = 1\n" * 500),
    (house_rules.check_function_lengths, function(num_lines=80)),
    (
        house_rules.check_parameter_counts,
        method(parameters="self, a, b, c, *, d, e, f, **g"),
    ),
    (
        house_rules.check_parameter_counts,
        "def f(  # noqa: PLR0913 - one per flag\n    a, b, c, d, e, f, g):\n    pass",
    ),
    (house_rules.check_no_mutable_globals, "__all__ = ['a']\n_BY_NAME = {1: 2}\nITEMS = [1]\nx = (1, 2)"),
    (
        house_rules.check_no_mutable_globals,
        "app = typer.Typer()\ndef f():\n    seen = []\n    seen.append(1)",
    ),
    (house_rules.check_no_mutable_globals, "A = MappingProxyType({1: 2})\nclass B:\n    c = []"),
    (house_rules.check_cli_imports, "from workers.config import KvConfig\ndef f():\n    import torch"),
    (house_rules.check_cli_imports, "if TYPE_CHECKING:\n    import ray\nimport rich, raymond"),
    (house_rules.check_silencers_say_why, "x = 1  # noqa: S101, E501 - the table reads better in one line"),
    (
        house_rules.check_silencers_say_why,
        "x = 1  # type: ignore[misc]  # grpc has no types for it\ns = '# noqa'",
    ),
]


@pytest.mark.parametrize(("rule", "source"), KEEPS)
def test_rule_lets_through(rule: Rule, source: str) -> None:
    assert rule(source) == []


def test_package_guard_catches_another_owner() -> None:
    findings = house_rules.check_package_owners(
        {"wire": ["moray", "wirelib"], "model": ["moray"], "re": ["x"]}
    )
    assert [finding.message for finding in findings] == ["package name 'wire' is also installed by wirelib"]
