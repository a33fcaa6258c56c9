"""Chooses who reads the topology, by `topology.source`."""

import logging
from collections.abc import Callable, Sequence

from cluster.config import TopologyConfig
from cluster.topology.kubernetes import is_in_cluster, make_kubernetes_topology
from cluster.topology.ray_labels import RayTopology, read_ray_topology
from cluster.topology.types import NodeTopology, RayNode, TopologyReader
from wire.errors import MorayError

logger = logging.getLogger(__name__)


def make_topology_reader(
    config: TopologyConfig,
    *,
    in_cluster: Callable[[], bool] = is_in_cluster,
    make_kubernetes: Callable[[TopologyConfig], TopologyReader] = make_kubernetes_topology,
) -> TopologyReader:
    """The reader that `config.source` names; auto takes Kubernetes inside a pod, Ray labels elsewhere.

    Under auto a Kubernetes API that refuses or fails costs the finer placement, not the cluster: Ray labels
    are used, and it is logged once. Under `kubernetes` the error is raised.

    Raises:
        ConfigError: source is kubernetes, but this process has no service account.
    """
    if config.source == "ray" or (config.source == "auto" and not in_cluster()):
        return RayTopology(config)
    reader = make_kubernetes(config)
    return reader if config.source == "kubernetes" else _WithFallback(reader, config)


class _WithFallback:
    """A reader whose failures are answered from Ray labels, logged when they begin and when they end."""

    def __init__(self, reader: TopologyReader, config: TopologyConfig) -> None:
        self._reader = reader
        self._config = config
        self._failure = ""

    def read(self, nodes: Sequence[RayNode]) -> list[NodeTopology]:
        """The topology of each node, in the order given."""
        try:
            found = self._reader.read(nodes)
        except MorayError as error:
            if error.message != self._failure:
                logger.warning("node labels come from Ray, since Kubernetes fails: %s", error.message)
            self._failure = error.message
            return read_ray_topology(nodes, self._config)
        if self._failure:
            logger.info("node labels come from Kubernetes again")
            self._failure = ""
        return found
