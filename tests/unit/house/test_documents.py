"""Every file that a document names exists, every link leads somewhere, every `make x` is a target."""

import re
from pathlib import Path

import house_docs
import pytest
from house_rules import PACKAGES, ROOT, python_files

DOCUMENTS = house_docs.markdown_files()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_names_only_what_exists(document: Path) -> None:
    text = document.read_text()
    findings = [
        *house_docs.check_named_paths(text, base=document.parent),
        *house_docs.check_links(text, base=document.parent),
    ]
    assert [f"{document.name}:{finding.line}: {finding.message}" for finding in findings] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_names_only_make_targets_that_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert house_docs.make_targets_named(document.read_text()) - targets == set()


def test_every_folder_of_the_root_is_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    packages = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    assert [name for name in packages if f"`{name}/`" not in text] == []


def test_letters_of_every_file_are_in_the_legend() -> None:
    known = house_docs.legend_letters((ROOT / "docs/shapes.md").read_text())
    findings = [
        f"{path.relative_to(ROOT)}: {finding.message}"
        for path in python_files(*PACKAGES)
        for finding in house_docs.check_letters(path.read_text(), known=known)
    ]
    assert findings == []


def test_letter_rule_catches() -> None:
    source = '"""A module.\n\nLetters: T tokens,\nZ zebras (all of them), D hidden.\n"""\n'
    assert len(house_docs.check_letters(source, known={"T", "D"})) == 1
    assert house_docs.check_letters(source, known={"T", "Z"}) != []
    assert house_docs.check_letters(source, known={"T", "Z", "D"}) == []


@pytest.mark.parametrize(
    "text",
    [
        "see `wire/no_such_file.py`",
        "see `wire/errors.py` and `nowhere.md`",
        "see `wire/no_such_file.py:12`",
        "see `tests/unit/no_such.py::test_x`",
        "the folder `simulator.py`, in `cluster/nowhere/`",
        "all of `docs/*.nothing`",
        "see `../shared/DESIGN.md`",
    ],
)
def test_named_path_rule_catches(text: str) -> None:
    assert len(house_docs.check_named_paths(text, base=ROOT)) == 1 + ("simulator" in text)


@pytest.mark.parametrize(
    "text",
    [
        "`wire/errors.py`, `wire/errors.py:12`, `wire/`, `wire/*.py`, `Makefile`, `./Makefile`",
        "`GET /metrics`, `/metrics`, `moray.v1.Inference/Generate`, `model`, `.venv/bin/moray`, `.proto`",
        "```\nvim wire/no_such_file.py `wire/no_such_file.py`\n```",
    ],
)
def test_named_path_rule_lets_through(text: str) -> None:
    assert house_docs.check_named_paths(text, base=ROOT) == []


def test_named_path_may_be_relative_to_the_document() -> None:
    assert house_docs.check_named_paths("`errors.py`", base=ROOT / "wire") == []
    assert len(house_docs.check_named_paths("`errors.py`", base=ROOT / "docs")) == 1


@pytest.mark.parametrize("target", ["nowhere.md", "#no-such-heading", "wire/errors.py/x", "../outside"])
def test_link_rule_catches(target: str) -> None:
    assert len(house_docs.check_links(f"# A heading\n[text]({target})", base=ROOT)) == 1


@pytest.mark.parametrize("target", ["https://example.org/x", "#a-heading-two", "Makefile", "wire/"])
def test_link_rule_lets_through(target: str) -> None:
    assert house_docs.check_links(f"# A heading: two\n[text]({target})", base=ROOT) == []


def test_make_targets_are_found_inline_and_fenced() -> None:
    text = "run `make test`, please make sure\n```\nmake run ONCE=1\ncd moray && make soak\n```"
    assert house_docs.make_targets_named(text) == {"test", "run", "soak"}
