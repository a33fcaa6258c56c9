"""A real Prometheus finds every process through the router's /sd and scrapes it."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_cluster import Running, answers, free_port, wait_until

from wire.metrics import METRICS, Kind

MEMBERS = {"router-0", "controller", "expert-0", "expert-1", "prefill-0", "decode-0"}


@pytest.fixture(scope="module")
def prometheus(cluster: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus that knows nothing but the router's discovery endpoint."""
    if shutil.which("prometheus") is None:
        pytest.skip("Debian package prometheus is not installed (make test installs it as root)")
    folder: Path = tmp_path_factory.mktemp("prometheus")
    http = cluster.shell.members()["router-0"]["metrics_address"]
    job = {"job_name": "moray", "http_sd_configs": [{"url": f"http://{http}/sd", "refresh_interval": "1s"}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={url.removeprefix('http://')}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    wait_until(lambda: answers(f"{url}/-/ready"), what="Prometheus")
    yield url
    process.terminate()
    process.wait(timeout=30)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    encoded = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{url}/api/v1/query?{encoded}", timeout=10) as response:
        result: list[dict[str, Any]] = json.loads(response.read())["data"]["result"]
        return result


LATER = (
    *("_refused_total", "_dropped_total", "_retries_total", "_restarts_total"),
    *("_preemptions_total", "_resumes_total", "_drained_total", "_replans_total"),
    "_phase_load_balance_ratio",
)
"""Ends of the names of labelled metrics of failures, or of what one plain request does not bring about: they
have no sample before a label is first used."""
UNUSED = tuple(f"moray_attention_{part}" for part in ("drafts", "grammars", "kv_tier"))
"""Begins of the names of what this cluster does not use."""


def test_every_process_is_found_and_up(prometheus: str) -> None:
    def up() -> set[str]:
        return {row["metric"]["worker_id"] for row in query(prometheus, "up == 1")}

    wait_until(lambda: up() == MEMBERS, what=f"{MEMBERS} to be scraped, so far {up()}")


def test_every_declared_metric_arrives_after_a_request(prometheus: str, cluster: Running) -> None:
    cluster.shell.generate([[1, 2, 3, 4, 5]], "--max-tokens", "4")

    def missing() -> list[str]:
        suffix = {Kind.HISTOGRAM: "_count", Kind.COUNTER: "", Kind.GAUGE: ""}
        return [
            spec.name
            for spec in METRICS
            if not spec.name.endswith(LATER)
            and not spec.name.startswith(UNUSED)
            and not query(prometheus, spec.name + suffix[spec.kind])
        ]

    wait_until(lambda: not missing(), what="every metric", deadline_s=30)


def test_tokens_are_counted(prometheus: str, cluster: Running) -> None:
    def generated() -> float:
        rows = query(prometheus, "moray_router_generated_tokens_total")
        return float(rows[0]["value"][1]) if rows else 0.0

    before = generated()
    cluster.shell.generate([[1, 2, 3]], "--max-tokens", "9")
    wait_until(lambda: generated() >= before + 9, what="nine more tokens", deadline_s=30)
