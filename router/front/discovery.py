"""What Prometheus should scrape, in the format of its http_sd_configs. Pure."""

from typing import TypedDict

from wire.proto import control_pb2


class TargetGroup(TypedDict):
    """One entry of the answer."""

    targets: list[str]
    labels: dict[str, str]


def targets_of(
    snapshot: control_pb2.ClusterSnapshot | None, *, router_name: str, router_address: str
) -> list[TargetGroup]:
    """The router, then every member with a metrics endpoint, by id.

    Args:
        snapshot: the newest one, or None before the first.
        router_name: this router's own name.
        router_address: host:port of this router's HTTP server, as others reach it.
    """
    own = TargetGroup(targets=[router_address], labels={"role": "router", "worker_id": router_name})
    members = sorted(snapshot.members, key=lambda member: member.worker_id) if snapshot else []
    others = [
        TargetGroup(targets=[member.metrics_address], labels=_labels(member))
        for member in members
        if member.metrics_address and member.metrics_address != router_address
    ]
    return [own, *others]


def role_name(role: "control_pb2.Role.ValueType") -> str:
    """`prefill` for ROLE_PREFILL.

    >>> role_name(control_pb2.ROLE_BOTH)
    'both'
    """
    return control_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _labels(member: control_pb2.Member) -> dict[str, str]:
    node = member.node
    pairs = {
        "role": role_name(member.role),
        "worker_id": member.worker_id,
        "node": node.node_id,
        "host": node.host,
        "zone": node.zone,
        "rack": node.rack,
    }
    return {name: value for name, value in pairs.items() if value}
