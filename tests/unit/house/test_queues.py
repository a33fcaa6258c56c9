"""No wait with a timeout on a SimpleQueue: CPython 3.11 may wait for ever there, the time being negative."""

from pathlib import Path

import pytest
from house_rules import PACKAGES

ROOT = Path(__file__).parents[3]
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if "SimpleQueue()" in path.read_text()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_simple_queue_is_waited_for_without_a_timeout(path: Path) -> None:
    assert "get(timeout" not in path.read_text()
