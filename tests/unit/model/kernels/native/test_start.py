"""Where threads run after `start`; in a process of its own, since the binding stays."""

import json
import os
import subprocess
import sys

import pytest

from tests.unit.model.implementations import named_kernels

SCRIPT = """
import json, os, sys
from model.kernels.native.kernels import NativeKernels
from model.kernels.native.library import load_library
found = load_library()
seen = []
for num_threads in map(int, sys.argv[1:]):
    NativeKernels(*found, num_threads=num_threads).start()
    seen.append(sorted(os.sched_getaffinity(0)))
print(json.dumps(seen))
"""


def _processors_after(*num_threads: int) -> list[list[int]]:
    """Of the calling thread, after each start with so many threads."""
    command = [sys.executable, "-c", SCRIPT, *map(str, num_threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_threads_are_bound_only_where_all_processors_are_theirs() -> None:
    named_kernels("plain")  # skips where nothing is built
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs Linux and two processors")
    processors = sorted(os.sched_getaffinity(0))
    few, all_of_them = _processors_after(1, len(processors))
    assert few == processors
    assert all_of_them == processors[:1]
