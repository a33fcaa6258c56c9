"""Homes: on which node each worker starts. A pure decision over nodes, their labels and what is taken.

Workers of a group spread over zones, then racks, then hosts, then nodes. Two expert workers on three nodes in
zones a, a, b go to one node of a and the node of b.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.topology.types import NodeTopology

_DEPTHS = (1, 2, 3)
"""Prefixes of a failure domain: zone; zone and rack; zone, rack and host."""


@dataclass(frozen=True, kw_only=True)
class NodeCapacity:
    """A live node: where it stands and what it offers."""

    topology: NodeTopology
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one worker of a group asks of its node."""

    group: str
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    node_selector: Mapping[str, str]
    max_per_node: int = 0
    """0 = no bound."""


@dataclass(frozen=True)
class Home:
    """A worker that has a node already."""

    node_id: str
    needs: Needs


def plan_home(needs: Needs, nodes: Sequence[NodeCapacity], taken: Sequence[Home]) -> NodeTopology | None:
    """The node for one more worker; None when no node can take it now.

    Args:
        needs: the worker's needs.
        nodes: live nodes, in a fixed order that breaks ties.
        taken: homes given already, of every group.
    """
    fitting = [node for node in nodes if _fits(needs, node, taken)]
    if not fitting:
        return None
    domain_of = {node.topology.node_id: node.topology.failure_domain for node in nodes}
    peers = [home.node_id for home in taken if home.needs.group == needs.group and home.node_id in domain_of]
    per_node = Counter(peers)
    per_domain = Counter(domain_of[node_id][:depth] for node_id in peers for depth in _DEPTHS)
    everyone = Counter(home.node_id for home in taken)

    def crowding(node: NodeCapacity) -> tuple[int, ...]:
        node_id, domain = node.topology.node_id, node.topology.failure_domain
        return (*(per_domain[domain[:depth]] for depth in _DEPTHS), per_node[node_id], everyone[node_id])

    return min(fitting, key=crowding).topology


def _fits(needs: Needs, node: NodeCapacity, taken: Sequence[Home]) -> bool:
    labels = node.topology.labels
    if any(labels.get(key) != value for key, value in needs.node_selector.items()):
        return False
    here = [home.needs for home in taken if home.node_id == node.topology.node_id]
    num_peers = sum(other.group == needs.group for other in here)
    return (
        (needs.max_per_node == 0 or num_peers < needs.max_per_node)
        and sum(other.num_cpus for other in here) + needs.num_cpus <= node.num_cpus
        and sum(other.num_gpus for other in here) + needs.num_gpus <= node.num_gpus
    )
