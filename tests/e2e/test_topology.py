"""Workers and expert replicas are placed by the labels of the nodes that Ray runs on."""

from collections.abc import Callable, Iterator

import pytest
from e2e_cluster import RayHead, Shell, end, start_ray_head, start_ray_node


@pytest.fixture(scope="module")
def two_zones(make_shell: Callable[[], Shell]) -> Iterator[RayHead]:
    """A Ray cluster of two nodes, one in zone east and one in zone west."""
    head = start_ray_head(make_shell(), zone="east")
    node = start_ray_node(head, zone="west")
    yield head
    end(node)
    end(head.process)


def test_workers_and_replicas_spread_over_the_zones(
    two_zones: RayHead, make_shell: Callable[[], Shell]
) -> None:
    shell = make_shell()
    values = {
        "model": "tiny",
        "name": "zones",
        "router": {"grpc_port": 0, "http_port": 0},
        # Twice the slots that the experts need: every expert gets a second replica.
        "expert": {"replicas": 2, "num_slots": 32, "max_per_node": 1},
        "decode": {"node_selector": {"topology.kubernetes.io/zone": "west"}},
    }
    up = shell.run("up", "--config", str(shell.config(values)), "--detach", **two_zones.joined)
    assert up.returncode == 0, up.stderr
    try:
        snapshot = shell.status()
        placed = [member for member in snapshot["members"] if "node" in member]
        zone = {member["worker_id"]: member["node"]["zone"] for member in placed}
        assert {zone["expert-0"], zone["expert-1"]} == {"east", "west"}
        assert zone["decode-0"] == "west"
        for layer in snapshot["table"]["layers"]:
            pairs = zip(layer["expert_idx"], layer["worker_idx"], strict=True)
            homes = {(expert, zone[snapshot["table"]["worker_ids"][worker]]) for expert, worker in pairs}
            assert homes == {(expert, z) for expert in range(32) for z in ("east", "west")}
        assert len(shell.generate([[9, 8, 7]], "--max-tokens", "8")[0]) == 8
    finally:
        assert shell.run("down").returncode == 0
