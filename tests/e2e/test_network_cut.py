"""An expert worker whose network is cut while its process lives on: nobody notices.

The worker's node is in a network namespace that the test makes, and the cut is its link going down.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e_cluster import (
    ZONE_LABEL,
    RayHead,
    Shell,
    end,
    num_live_nodes,
    start_ray_head,
    start_ray_node,
    wait_until,
)
from e2e_streams import make_load

NAMESPACE, LINK, PEER = "moray-cut", "mcut0", "mcut1"
HERE, THERE = "10.213.7.1", "10.213.7.2"

needs_namespaces = pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0, reason="needs root and iproute2: network namespaces"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def link() -> Iterator[None]:
    """A namespace joined to this one by a pair of virtual links."""
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)
    ip("netns", "add", NAMESPACE)
    ip("link", "add", LINK, "type", "veth", "peer", "name", PEER, "netns", NAMESPACE)
    ip("addr", "add", f"{HERE}/30", "dev", LINK)
    ip("link", "set", LINK, "up")
    ip("-n", NAMESPACE, "addr", "add", f"{THERE}/30", "dev", PEER)
    ip("-n", NAMESPACE, "link", "set", PEER, "up")
    ip("-n", NAMESPACE, "link", "set", "lo", "up")
    yield
    ip("netns", "del", NAMESPACE)


@pytest.fixture
def two_nodes(link: None, make_shell: Callable[[], Shell]) -> Iterator[RayHead]:
    """A Ray cluster of this namespace and the other one."""
    head = start_ray_head(make_shell(), zone="here", host=HERE)
    node = start_ray_node(head, zone="there", host=THERE, namespace=NAMESPACE)
    wait_until(lambda: num_live_nodes(head) == 2, what="the second node")
    yield head
    end(node)
    end(head.process)


@needs_namespaces
def test_cut_network_of_an_expert_worker_changes_nothing(
    two_nodes: RayHead, make_shell: Callable[[], Shell]
) -> None:
    shell = make_shell()
    here = {"node_selector": {ZONE_LABEL: "here"}}
    values = {
        "model": "tiny",
        "name": "cut",
        "router": {"grpc_port": 0, "http_port": 0},
        "expert": {"replicas": 3},
        "prefill": here,
        "decode": here,
    }
    up = shell.run("up", "--config", str(shell.config(values)), "--detach", **two_nodes.joined)
    assert up.returncode == 0, up.stderr
    try:
        members = shell.members()
        cut = [name for name, member in members.items() if member.get("node", {}).get("zone") == "there"]
        assert cut, "no expert worker is in the other namespace"
        assert all(name.startswith("expert-") for name in cut)
        load = make_load(members["router-0"]["address"])
        expected, _ = load.expected()
        with load.running(expected) as answers:
            wait_until(lambda: answers.num_done >= 2, what="streams to run")
            ip("link", "set", LINK, "down")
            wait_until(lambda: not are_named(shell.status(), cut), what="tables without what was cut")
            done = answers.num_done
            wait_until(lambda: answers.num_done >= done + 16, what="streams to go on")
        assert answers.wrong == []
        ip("link", "set", LINK, "up")
        with load.running(expected) as answers:
            wait_until(lambda: answers.num_done >= 16, what="streams after the network is back")
        assert answers.wrong == []
    finally:
        down = shell.run("down")
    assert down.returncode == 0, down.stderr


def are_named(snapshot: dict[str, Any], worker_ids: list[str]) -> bool:
    """Whether the table sends rows to workers at the addresses that were cut."""
    there = {
        member["worker_id"]
        for member in snapshot["members"]
        if member["worker_id"] in worker_ids and member.get("address", "").startswith(THERE)
    }
    return bool(there & set(snapshot["table"]["worker_ids"]))
