"""`moray bench throughput` of a cluster: it starts one, measures it and leaves nothing behind."""

import json
from collections.abc import Callable

from e2e_cluster import RayHead, Shell


def test_cluster_is_measured(make_shell: Callable[[], Shell], ray_head: RayHead) -> None:
    shell = make_shell()
    flags = ["--prefill-tokens", "24", "--prompt-tokens", "9", "--new-tokens", "12", "--batches", "2"]
    flags += ["--repeats", "1", "--threads", "1", "--dtype", "int8", "--json"]
    done = shell.run("bench", "throughput", "--topology", "cluster", *flags, **ray_head.joined)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["topology"], row["phase"], row["batch"]) for row in rows] == [
        ("cluster", "prefill", 1),
        ("cluster", "decode", 2),
    ]
    assert [row["tokens_per_s"]["median"] > 0 for row in rows] == [True, True]
    assert [row["step_ms"] for row in rows] == [None, None]
    assert not (shell.folder / "cluster.json").exists()
