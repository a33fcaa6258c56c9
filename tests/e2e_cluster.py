"""Whole clusters for tests/e2e, driven by the real command line on free ports."""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

T = TypeVar("T")
BIN = Path(sys.executable).parent
START_S = 180
STOP_S = 60
ZONE_LABEL = "topology.kubernetes.io/zone"
TINY = {"model": "tiny", "kv": {"page_tokens": 4}, "router": {"grpc_port": 0, "http_port": 0}}


@dataclass(frozen=True)
class Shell:
    """Runs `moray` with a state file and caches of its own."""

    env: dict[str, str]
    folder: Path

    def run(
        self, *arguments: str, timeout_s: float = START_S, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """One command, its output captured."""
        return subprocess.run(
            [str(BIN / "moray"), *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def generate(self, prompts: list[list[int]], *arguments: str, **env: str) -> list[list[int]]:
        """New tokens of token prompts, all asked at once."""
        file = self.folder / f"tokens-{time.monotonic_ns()}.json"
        file.write_text(json.dumps({"tokens": prompts}))
        done = self.run("generate", "--tokens", str(file), "--ignore-eos", "--json", *arguments, **env)
        assert done.returncode == 0, done.stderr
        outputs: list[list[int]] = json.loads(done.stdout)["outputs"]
        return outputs

    def config(self, values: dict[str, Any]) -> Path:
        """A config file."""
        file = self.folder / f"config-{time.monotonic_ns()}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def popen(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        """A command that goes on; in a session of its own, as in a terminal."""
        return subprocess.Popen(
            [str(BIN / "moray"), *arguments],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def status(self) -> dict[str, Any]:
        """The snapshot behind `moray status --json`."""
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        snapshot: dict[str, Any] = json.loads(done.stdout)
        return snapshot

    def members(self) -> dict[str, dict[str, Any]]:
        """Members by worker id."""
        return {member["worker_id"]: member for member in self.status()["members"]}


@dataclass(frozen=True)
class Running:
    """A cluster in the foreground of a process."""

    shell: Shell
    process: "subprocess.Popen[str]"

    def processes(self) -> list[psutil.Process]:
        """The command and everything that it started."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


def wait_until(probe: Callable[[], T], *, what: str, deadline_s: float = 60.0) -> T:
    """The first truthy value of a probe; polls, for what no event tells."""
    ends_s = time.monotonic() + deadline_s
    while time.monotonic() < ends_s:
        value = probe()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"still waiting for {what} after {deadline_s} s")


def scrape(address: str) -> dict[str, float]:
    """Sample name with labels -> value, of one Prometheus endpoint."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def pid_of(running: Running, worker_id: str) -> psutil.Process:
    """The process that listens at a member's address."""
    port = int(running.shell.members()[worker_id]["address"].rsplit(":", 1)[1])
    for process in running.processes():
        listening = {c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        if port in listening:
            return process
    raise AssertionError(f"nobody listens on port {port} of {worker_id}")


def wait_for_line(process: "subprocess.Popen[str]", pattern: str) -> str:
    """Reads a command's output up to a line that matches."""
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"ended with {process.wait()} before {pattern!r}:\n{''.join(seen)}")


def end(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGTERM) -> str:
    """Sends a signal to one process and waits for its end; the rest of its output."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=STOP_S)
    return output


@dataclass(frozen=True)
class RayHead:
    """A running `ray start --head`."""

    shell: Shell
    process: "subprocess.Popen[str]"
    gcs_address: str
    dashboard: str
    """http://host:port of the job server."""

    @property
    def joined(self) -> dict[str, str]:
        """Environment of a command that joins it."""
        return {"RAY_ADDRESS": self.gcs_address}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_ray_head(shell: Shell, *, zone: str = "", host: str = "127.0.0.1") -> RayHead:
    """A Ray head on free ports of an address; tried again once: a port that was free may be taken by then."""
    head = _begin_ray_head(shell, zone=zone, host=host)
    try:
        wait_until(lambda: answers(f"{head.dashboard}/api/version"), what="Ray's dashboard")
    except AssertionError:
        end(head.process)
        head = _begin_ray_head(shell, zone=zone, host=host)
        wait_until(lambda: answers(f"{head.dashboard}/api/version"), what="Ray's dashboard")
    return head


def _begin_ray_head(shell: Shell, *, zone: str, host: str) -> RayHead:
    """Starts it, with a folder of its own: Ray's socket paths must be short."""
    gcs_port, dashboard_port, agent_port = free_port(), free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={host}",
        f"--port={gcs_port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",
        f"--temp-dir={folder}",
        "--num-cpus=2",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        f"--labels={ZONE_LABEL}={zone}",
    ]
    process = subprocess.Popen(
        command,
        env=shell.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return RayHead(shell, process, f"{host}:{gcs_port}", f"http://127.0.0.1:{dashboard_port}")


def start_ray_node(
    head: RayHead, *, zone: str, host: str = "127.0.0.1", namespace: str = ""
) -> "subprocess.Popen[str]":
    """One more Ray node on this machine, with a zone label; in a network namespace if one is named."""
    command = [
        *(["ip", "netns", "exec", namespace] if namespace else []),
        str(BIN / "ray"),
        "start",
        "--block",
        f"--address={head.gcs_address}",
        f"--node-ip-address={host}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--num-cpus=2",
        "--object-store-memory=100000000",
        f"--labels={ZONE_LABEL}={zone}",
    ]
    return subprocess.Popen(
        command,
        env=head.shell.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def num_live_nodes(head: RayHead) -> int:
    """Nodes of a Ray cluster that its head holds for alive."""
    with urllib.request.urlopen(f"{head.dashboard}/api/v0/nodes", timeout=10) as response:
        nodes = json.load(response)["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" for node in nodes)


def answers(url: str) -> bool:
    """Whether an HTTP GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
