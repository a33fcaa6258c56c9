"""What `make check` runs is complete: no step is empty, the hooks run the same, the pins agree."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import yaml
from house_rules import PACKAGES, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def make(*arguments: str) -> str:
    """Output of make on the environment that runs this test; nothing is installed."""
    stamp = f"{sys.prefix}/.installed-dev"
    # Not the flags and jobs of the make that may have started this test.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(ROOT), "--no-print-directory", "-o", stamp, f"VENV={sys.prefix}", *arguments]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def commands_of_check() -> list[str]:
    return [line.replace(f"{sys.prefix}/bin/", "") for line in make("-n", "check").splitlines()]


def test_check_has_its_five_steps() -> None:
    assert commands_of_check() == [
        "ruff format --check .",
        "ruff check .",
        "mypy",
        "lint-imports",
        "pytest -q tests/unit",
    ]


def test_hooks_run_what_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].removeprefix(".venv/bin/") for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == commands_of_check()


def test_test_runs_the_other_steps_too() -> None:
    commands = [line.replace(f"{sys.prefix}/bin/", "") for line in make("-n", "test").splitlines()]
    assert set(commands_of_check()[:-1]) < set(commands)
    assert commands[-2].startswith('pytest -m "not slow" -n 2 tests/unit')
    assert commands[-1].startswith('pytest -m "not slow" ')


def test_test_runs_every_folder_of_tests() -> None:
    run = " ".join(make("-n", "test").splitlines()[-2:]).split()
    folders = {path.relative_to(ROOT).parts[1] for path in (ROOT / "tests").rglob("test_*.py")}
    assert {f"tests/{folder}" for folder in folders} <= set(run)


def test_help_describes_every_target_that_people_call() -> None:
    described = {line.split()[0] for line in make("help").splitlines()}
    assert described >= {"help", "run", "test", "soak", "check", "proto", "bench"}


def test_types_are_checked_in_every_package() -> None:
    assert PROJECT["tool"]["mypy"]["strict"] is True
    assert set(PROJECT["tool"]["mypy"]["files"]) >= set(PACKAGES)
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)


def has_code(module: str) -> bool:
    """Whether the package or module holds anything besides docstrings of its packages."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or any(file.name != "__init__.py" for file in path.rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_root_of_the_import_rules_is_empty(package: str) -> None:
    assert package in PROJECT["tool"]["importlinter"]["root_packages"]
    assert has_code(package)


@pytest.mark.parametrize("contract", PROJECT["tool"]["importlinter"]["contracts"], ids=lambda c: c["name"])
def test_import_contract_is_about_modules_that_exist(contract: dict[str, list[str]]) -> None:
    ours = [name for key in ("source_modules", "forbidden_modules") for name in contract[key]]
    missing = [name for name in ours if name.split(".")[0] in PACKAGES and not has_code(name)]
    assert missing == []
    assert contract["source_modules"]
    assert contract["forbidden_modules"]


def test_empty_module_is_seen() -> None:
    assert has_code("wire.errors")
    assert not has_code("wire.nothing")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): pinned
        for name, _, pinned in (line.partition("==") for line in lines if not line.startswith("#"))
    }


def test_constraints_hold_exact_versions_only() -> None:
    bad = [line for line in constraints().values() if not re.fullmatch(r"[0-9][0-9a-z.]*", line)]
    assert bad == []


def test_constraints_agree_with_the_pins_of_the_project() -> None:
    project = PROJECT["project"]
    pins = [
        Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])
    ]
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert {name: f"=={constraints().get(name)}" for name in pinned} == pinned


def needed(names: list[str]) -> set[str]:
    """Every installed distribution that these need, themselves among them."""
    seen: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        key = f"{canonicalize_name(requirement.name)}[{','.join(sorted(requirement.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        for text in requires(requirement.name) or ():
            child = Requirement(text)
            environments = [{"extra": extra} for extra in (*requirement.extras, "")]
            if child.marker is None or any(child.marker.evaluate(env) for env in environments):
                waiting.append(child)
    return {key.partition("[")[0] for key in seen}


def test_constraints_cover_all_that_is_installed_for_us() -> None:
    project = PROJECT["project"]
    names = needed([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    # On a CUDA build torch brings NVIDIA's libraries and triton; they follow torch's own exact pins.
    others = {name for name in names if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert sorted(others - set(constraints()) - {"pip", "setuptools"}) == []


def test_installed_versions_are_the_pinned_ones() -> None:
    wrong = []
    for name, pinned in constraints().items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
        if installed != pinned:
            wrong.append(f"{name}: installed {installed}, constraints.txt says {pinned}")
    assert wrong == []
