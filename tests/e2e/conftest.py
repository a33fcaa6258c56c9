"""Whole clusters, started and stopped by the real command line on free ports."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e_cluster import BIN, TINY, RayHead, Running, Shell, end, start_ray_head, wait_for_line


@pytest.fixture(scope="session")
def make_shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Shell]:
    """Makes shells that know nothing of each other, or of the user's clusters."""
    cache = tmp_path_factory.mktemp("cache")

    def make() -> Shell:
        folder = tmp_path_factory.mktemp("moray")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MORAY_"))}
        env = kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "MORAY_STATE_FILE": str(folder / "cluster.json"),
            "MORAY_CACHE_DIR": str(cache),
            "RAY_AUTH_MODE": "disabled",
        }
        return Shell(env=env, folder=folder)

    return make


@pytest.fixture(scope="session")
def start(make_shell: Callable[[], Shell]) -> Iterator[Callable[..., Running]]:
    """Starts clusters with `moray up`; ends those that a test left running."""
    started: list[Running] = []

    def begin(values: dict[str, Any] | None = None, *arguments: str) -> Running:
        shell = make_shell()
        process = shell.popen("up", "--config", str(shell.config(TINY | (values or {}))), *arguments)
        started.append(Running(shell, process))
        wait_for_line(process, "Ctrl-C")
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            end(running.process)


@pytest.fixture(scope="session")
def cluster(start: Callable[..., Running]) -> Running:
    """One default cluster (2 expert, 1 prefill, 1 decode worker) shared by tests that do no harm."""
    return start()


@pytest.fixture(scope="session")
def ray_head(make_shell: Callable[[], Shell]) -> Iterator[RayHead]:
    """A Ray cluster of one node that lives longer than any Moray cluster in it."""
    head = start_ray_head(make_shell())
    yield head
    end(head.process)
