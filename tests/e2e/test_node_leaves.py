"""A Ray node leaves under streams: its attention workers drain, and no answer changes."""

import json
from collections.abc import Callable, Iterator

import pytest
from e2e_cluster import RayHead, Shell, end, num_live_nodes, start_ray_head, start_ray_node, wait_until
from e2e_streams import make_load


@pytest.fixture
def head(make_shell: Callable[[], Shell]) -> Iterator[RayHead]:
    head = start_ray_head(make_shell(), zone="east")
    yield head
    end(head.process)


def test_node_that_is_drained_and_ends_changes_no_answer(
    head: RayHead, make_shell: Callable[[], Shell]
) -> None:
    node = start_ray_node(head, zone="west")
    wait_until(lambda: num_live_nodes(head) == 2, what="the second node")
    shell = make_shell()
    values = {
        "model": "tiny",
        "name": "leaves",
        "router": {"grpc_port": 0, "http_port": 0},
        "prefill": {"replicas": 2, "max_per_node": 1},
        "decode": {"replicas": 2, "max_per_node": 1},
    }
    up = shell.run("up", "--config", str(shell.config(values)), "--detach", **head.joined)
    assert up.returncode == 0, up.stderr
    try:
        members = shell.members()
        there = {m for m, member in members.items() if member.get("node", {}).get("zone") == "west"}
        leaving = sorted(m for m in there if m.startswith(("prefill", "decode")))
        assert len(leaving) == 2
        load = make_load(members["router-0"]["address"], sampled=True)
        expected, _ = load.expected()
        with load.running(expected) as answers:
            wait_until(lambda: answers.num_done >= 2, what="streams to run")
            done = shell.run("drain", members[leaving[0]]["node"]["node_id"], "--json")
            assert done.returncode == 0, done.stderr
            assert sorted(json.loads(done.stdout)["worker_ids"]) == leaving
            end(node)
            wait_until(lambda: num_live_nodes(head) == 1, what="the node to be gone", deadline_s=90)
            num_done = answers.num_done
            wait_until(lambda: answers.num_done >= num_done + len(load.prompts), what="streams to go on")
        assert answers.wrong == []
        # There is no room for them on the node that is left.
        now = shell.members()
        assert not any(now[worker_id]["is_ready"] for worker_id in leaving)
    finally:
        assert shell.run("down").returncode == 0
