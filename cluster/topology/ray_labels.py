"""Topology from Ray node labels alone: outside Kubernetes, and for nodes that Kubernetes does not know."""

from collections.abc import Sequence

from cluster.config import TopologyConfig
from cluster.topology.types import NodeTopology, RayNode

RAY_ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Label that Ray sets itself on nodes with accelerators, e.g. H200."""


def read_ray_topology(nodes: Sequence[RayNode], config: TopologyConfig) -> list[NodeTopology]:
    """The topology that each node's own labels tell, in the order given.

    Args:
        nodes: what Ray knows.
        config: names the labels that mean zone, rack and accelerator.
    """
    return [topology_of(node, config) for node in nodes]


def topology_of(node: RayNode, config: TopologyConfig) -> NodeTopology:
    """The topology of one node by its labels; a node without any stands alone on its host."""
    accelerator = node.labels.get(config.accelerator_label) or node.labels.get(RAY_ACCELERATOR_LABEL, "")
    return NodeTopology(
        node_id=node.node_id,
        address=node.address,
        host=node.host or node.address,
        zone=node.labels.get(config.zone_label, ""),
        rack=node.labels.get(config.rack_label, ""),
        accelerator=accelerator,
        labels=dict(node.labels),
    )


class RayTopology:
    """Reads topology from Ray node labels."""

    def __init__(self, config: TopologyConfig) -> None:
        self._config = config

    def read(self, nodes: Sequence[RayNode]) -> list[NodeTopology]:
        """The topology of each node, in the order given."""
        return read_ray_topology(nodes, self._config)
