"""Facts about nodes: what Ray says of them, and where they stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class RayNode:
    """One live node as `ray.nodes()` tells it; the caller passes these in."""

    node_id: str
    """Ray's node id, hex."""
    address: str
    """IP address at which the node's workers listen."""
    host: str = ""
    """Host name; in Kubernetes the pod's."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray node labels (`ray start --labels`, and those that Ray sets itself)."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """What the node offers, e.g. {"CPU": 8.0, "GPU": 8.0}."""


@dataclass(frozen=True, kw_only=True)
class NodeTopology:
    """Where one Ray node stands; unknown facts are "".

    Example: Ray nodes in two pods on the machine gpu-7 of rack r2 in zone a have the same `host`, and so
    the same `failure_domain` ("a", "r2", "gpu-7"): losing the machine loses both.
    """

    node_id: str
    """Ray's node id, hex."""
    address: str
    """IP address at which the node's workers listen."""
    host: str
    """The machine: the Kubernetes node under the pod, or the host that Ray names."""
    zone: str = ""
    """Zone of the machine."""
    rack: str = ""
    """Rack of the machine."""
    accelerator: str = ""
    """Model of its accelerators, e.g. NVIDIA-H200."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """All labels of the machine, from wherever they were read."""

    @property
    def failure_domain(self) -> tuple[str, str, str]:
        """What fails together, widest first: (zone, rack, host)."""
        return (self.zone, self.rack, self.host)


class TopologyReader(Protocol):
    """Finds where Ray nodes stand; blocking, so called off the event loop."""

    def read(self, nodes: Sequence[RayNode]) -> list[NodeTopology]:
        """The topology of each node, in the order given."""
