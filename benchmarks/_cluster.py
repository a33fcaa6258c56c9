"""Whole clusters for benchmarks, started by the real command line on free ports."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.local_state import LocalCluster

START_S = 180


@contextmanager
def cluster(values: Mapping[str, Any]) -> Iterator[str]:
    """A cluster on this host that ends with the block; the address of its router.

    Args:
        values: its config; ports are chosen here.
    """
    router = {**values.get("router", {}), "grpc_port": 0, "http_port": 0}
    with tempfile.TemporaryDirectory() as folder:
        config, state = Path(folder) / "config.yaml", Path(folder) / "cluster.json"
        config.write_text(yaml.safe_dump({**values, "router": router}))
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "moray"), "up", "--config", str(config)],
            env=os.environ | {"MORAY_STATE_FILE": str(state)},
            stdout=subprocess.DEVNULL,
        )
        ends_s = time.monotonic() + START_S
        while not state.exists():
            if process.poll() is not None or time.monotonic() > ends_s:
                raise SystemExit("the cluster did not start")
            time.sleep(0.2)
        try:
            yield LocalCluster(**json.loads(state.read_text())).router_address
        finally:
            process.terminate()
            process.wait()


def machine() -> str:
    """The machine that figures belong to."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {versions}"
