"""Rules for the Markdown files: what a document names exists, and its links lead somewhere."""

import re
from pathlib import Path

from house_rules import PACKAGES, ROOT, Finding

TOP_LEVEL = (*PACKAGES, "helm", "k8s", "tests", "benchmarks", "docs", "training", "assets", ".ci")
# Made on the reader's machine, in no clone.
_LOCAL_ONLY = (".venv", ".cache")
_FILE_ENDINGS = (".py", ".pyi", ".md", ".toml", ".yaml", ".yml", ".txt", ".proto", ".tpl", ".sh")
_FILE_NAMES = ("Makefile", "Dockerfile", "LICENSE")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_PATH = re.compile(r"(?:\.{0,2}/)*[\w.@*-]+(?:/[\w.@*-]+)*/?")


def markdown_files() -> list[Path]:
    """The documents of the repository, in a fixed order."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in top if path.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def check_named_paths(text: str, *, base: Path) -> list[Finding]:
    """Every `path` in inline code that looks like one of the repository exists, from the root or from `base`.

    Looks like one: starts with a top-level folder, or ends as a source file does. Fenced blocks are not read;
    `folder/*.py` must match something; `file.py:12` and `file.py::test` mean the file.

    Args:
        text: Markdown.
        base: folder of the document.
    """
    found = []
    for number, line in _prose(text):
        for span in _CODE.findall(line):
            path = re.sub(r":.*$", "", span)
            if _PATH.fullmatch(path) and _looks_like_ours(path) and not _exists(path, base):
                found.append(Finding(number, f"names `{span}`, which does not exist"))
    return found


def check_links(text: str, *, base: Path) -> list[Finding]:
    """Every relative link resolves inside the repository, and its #fragment is a heading of its target."""
    found = []
    for number, line in _prose(text):
        for target in _LINK.findall(_CODE.sub("", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, fragment = target.partition("#")
            file = (base / path).resolve() if path else None
            if file is not None and not (file.exists() and file.is_relative_to(ROOT)):
                found.append(Finding(number, f"link to {target}, which does not exist in the repository"))
            elif fragment and fragment not in heading_slugs(file.read_text() if file else text):
                found.append(Finding(number, f"link to {target}: no such heading"))
    return found


def heading_slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = (line.lstrip("#") for _, line in _prose(text) if re.match(r"#{1,6} ", line))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


def make_targets_named(text: str) -> set[str]:
    """Targets of every `make x` in the document, inline or fenced."""
    return set(re.findall(r"(?:^|`|&& )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))


def legend_letters(text: str) -> set[str]:
    """The letters that docs/shapes.md explains."""
    return set(re.findall(r"^\| ([A-Z]) \|", text, flags=re.MULTILINE))


def check_letters(source: str, *, known: set[str]) -> list[Finding]:
    """Every letter that a file's own legend ("Letters: T tokens, ...") explains is one of the project's."""
    legend = re.search(r"Letters: (.*?)(?:\.\s|\.?\"\"\"|\n\n)", source, flags=re.DOTALL)
    letters = re.findall(r"(?:^|,)\s*([A-Z]) [a-z]", legend[1] if legend else "")
    return [
        Finding(1, f"letter {letter} is not in docs/shapes.md") for letter in letters if letter not in known
    ]


def _prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside fenced blocks."""
    lines = []
    is_fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced:
            lines.append((number, line))
    return lines


def _looks_like_ours(path: str) -> bool:
    first, _, rest = path.removeprefix("./").partition("/")
    if first in _LOCAL_ONLY or path in _FILE_ENDINGS:
        return False
    if first == "..":
        return True
    is_in_folder = first in TOP_LEVEL and bool(rest or path.endswith("/"))
    return is_in_folder or path.endswith(_FILE_ENDINGS) or path in _FILE_NAMES


def _exists(path: str, base: Path) -> bool:
    return any(
        found.resolve().is_relative_to(ROOT)
        for start in (ROOT, base)
        for found in (start.glob(path) if "*" in path else [start / path])
        if found.exists()
    )
