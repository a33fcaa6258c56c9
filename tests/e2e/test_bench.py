"""`moray bench throughput` and `load` of a cluster: they start one and leave nothing behind."""

import json
from collections.abc import Callable

from e2e_cluster import RayHead, Shell


def test_cluster_is_measured(make_shell: Callable[[], Shell], ray_head: RayHead) -> None:
    shell = make_shell()
    flags = ["--prefill-tokens", "24", "--prompt-tokens", "9", "--new-tokens", "12", "--batches", "2"]
    flags += ["--repeats", "1", "--threads", "1", "--dtype", "int8", "--json"]
    done = shell.run("bench", "throughput", "--topology", "both", *flags, **ray_head.joined)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["topology"], row["phase"], row["batch"]) for row in rows] == [
        ("in-process", "prefill", 1),
        ("in-process", "decode", 2),
        ("cluster", "prefill", 1),
        ("cluster", "decode", 2),
    ]
    assert min(row["tokens_per_s"]["median"] for row in rows) > 0
    assert [row["step_ms"] for row in rows] == [None] * 4
    rates = [row["tokens_per_s"]["median"] for row in rows]
    assert [row["of_in_process"] for row in rows] == [
        None,
        None,
        rates[2] / rates[0],
        rates[3] / rates[1],
    ]
    assert not (shell.folder / "cluster.json").exists()


def test_cluster_is_put_under_load(make_shell: Callable[[], Shell], ray_head: RayHead) -> None:
    shell = make_shell()
    ports = {"grpc_port": 0, "http_port": 0}
    config = shell.config({"model": "tiny", "kv": {"page_tokens": 4}, "router": ports})
    flags = ["--requests", "12", "--rate", "20", "--prompt-tokens", "30", "--new-tokens", "6"]
    flags += ["--shared-tokens", "20", "--config", str(config), "--json"]
    done = shell.run("bench", "load", *flags, **ray_head.joined)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["num_done"], found["errors"]) == ("tiny", 12, {})
    assert found["cached_share"] > 0
    assert found["itl_ms"]["p99"] > 0
