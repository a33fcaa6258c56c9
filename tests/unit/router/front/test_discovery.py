"""What Prometheus is told to scrape."""

import pytest

from router.front.discovery import role_name, targets_of
from wire.proto import control_pb2

NODE = control_pb2.NodeInfo(node_id="n1", host="h1", zone="z1", rack="r1", accelerator="a")


def member(name, role, metrics, node=None):
    return control_pb2.Member(worker_id=name, role=role, metrics_address=metrics, node=node)


def targets(*members):
    snapshot = control_pb2.ClusterSnapshot(members=members) if members else None
    return targets_of(snapshot, router_name="router-0", router_address="10.0.0.1:8000")


def test_router_names_itself_before_any_snapshot():
    assert targets() == [
        {"targets": ["10.0.0.1:8000"], "labels": {"role": "router", "worker_id": "router-0"}}
    ]


def test_every_member_with_metrics_is_a_target_in_order_of_ids():
    groups = targets(
        member("p1", control_pb2.ROLE_PREFILL, "h1:3", NODE),
        member("controller", control_pb2.ROLE_CONTROLLER, "h0:1"),
        member("d1", control_pb2.ROLE_DECODE, ""),
        member("e1", control_pb2.ROLE_EXPERT, "h1:2"),
    )
    assert [group["targets"] for group in groups] == [["10.0.0.1:8000"], ["h0:1"], ["h1:2"], ["h1:3"]]
    assert groups[3]["labels"] == {
        "role": "prefill",
        "worker_id": "p1",
        "node": "n1",
        "host": "h1",
        "zone": "z1",
        "rack": "r1",
    }


def test_labels_without_a_value_are_left_out():
    assert targets(member("e1", control_pb2.ROLE_EXPERT, "h:2"))[1]["labels"] == {
        "role": "expert",
        "worker_id": "e1",
    }


def test_router_that_is_a_member_too_is_named_once():
    groups = targets(member("router-0", control_pb2.ROLE_ROUTER, "10.0.0.1:8000"))
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("role", "name"), [(control_pb2.ROLE_BOTH, "both"), (control_pb2.ROLE_EXPERT, "expert")]
)
def test_role_name(role, name):
    assert role_name(role) == name
