"""Topology from Kubernetes: Ray node -> pod with the same address -> node under the pod -> its labels."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import TopologyConfig
from cluster.topology.ray_labels import topology_of
from cluster.topology.types import NodeTopology, RayNode
from wire.errors import ConfigError, NotReady

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api

logger = logging.getLogger(__name__)

SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT_S = 10.0
PAGE_OBJECTS = 500

Manifest = dict[str, Any]
"""One Kubernetes object, or a list of them, as JSON."""


def is_in_cluster(environ: Mapping[str, str] = os.environ, account_dir: Path = SERVICE_ACCOUNT_DIR) -> bool:
    """Whether this process runs in a pod that may talk to the API server."""
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) and (account_dir / "token").is_file()


def make_kubernetes_topology(
    config: TopologyConfig, account_dir: Path = SERVICE_ACCOUNT_DIR
) -> "KubernetesTopology":
    """A reader with the pod's own identity, in the pod's own namespace.

    Raises:
        ConfigError: `topology.source` asks for Kubernetes, but this is no pod with a service account.
    """
    from kubernetes import client
    from kubernetes import config as kubernetes_config

    settings = client.Configuration()
    load: Callable[..., None] = kubernetes_config.load_incluster_config
    try:
        load(client_configuration=settings)
        namespace = (account_dir / "namespace").read_text().strip()
    except (kubernetes_config.ConfigException, OSError) as error:
        raise ConfigError(
            field="topology.source",
            wanted="to run in a pod with a service account token",
            given=str(error),
            hint="set topology.source to ray or auto, or serviceAccount and rbac.create in the chart",
        ) from error
    settings.retries = 2
    return KubernetesTopology(
        client.CoreV1Api(client.ApiClient(settings)), namespace=namespace, config=config
    )


class KubernetesTopology:
    """Reads topology from the API server; nodes that it cannot map keep what their Ray labels say.

    Only the thread that calls `read` touches it.
    """

    def __init__(self, api: "CoreV1Api", *, namespace: str, config: TopologyConfig) -> None:
        self._api = api
        self._namespace = namespace
        self._config = config
        self._unmapped: set[str] = set()

    @property
    def num_unmapped(self) -> int:
        """Ray nodes seen so far for which Kubernetes knew no pod or no node."""
        return len(self._unmapped)

    def read(self, nodes: Sequence[RayNode]) -> list[NodeTopology]:
        """The topology of each node, in the order given.

        Raises:
            ConfigError: the service account may not list pods or nodes; says which right is missing.
            NotReady: the API server cannot be reached or fails; worth another try later.
        """
        node_name_of_ip = self._read_node_names()
        labels_of_node = self._read_node_labels()
        found = []
        for node in nodes:
            name = node_name_of_ip.get(node.address, "")
            if name in labels_of_node:
                found.append(self._place(node, name, labels_of_node[name]))
            else:
                self._log_unmapped(node)
                found.append(topology_of(node, self._config))
        return found

    def _place(self, node: RayNode, name: str, labels: Mapping[str, str]) -> NodeTopology:
        fallback = topology_of(node, self._config)
        return NodeTopology(
            node_id=node.node_id,
            address=node.address,
            host=name,
            zone=labels.get(self._config.zone_label) or fallback.zone,
            rack=labels.get(self._config.rack_label) or fallback.rack,
            accelerator=labels.get(self._config.accelerator_label) or fallback.accelerator,
            labels={**node.labels, **labels},
        )

    def _read_node_names(self) -> dict[str, str]:
        """The node under each running pod of the namespace, by the pod's address."""
        pods = self._list("pods", self._api.list_namespaced_pod, namespace=self._namespace)
        names = {}
        for pod in pods:
            status, node_name = pod.get("status", {}), pod.get("spec", {}).get("nodeName", "")
            if node_name and status.get("phase") not in ("Succeeded", "Failed"):
                names.update(dict.fromkeys(_addresses(status), node_name))
        return names

    def _read_node_labels(self) -> dict[str, Mapping[str, str]]:
        nodes = self._list("nodes", self._api.list_node)
        return {node["metadata"]["name"]: node["metadata"].get("labels", {}) for node in nodes}

    def _list(self, resource: str, call: Callable[..., Any], **where: str) -> list[Manifest]:
        """Every object of a list call, page by page."""
        items: list[Manifest] = []
        token = ""
        while True:
            page = self._call(resource, call, _continue=token, **where)
            items += page.get("items") or []
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return items

    def _call(self, resource: str, call: Callable[..., Any], **where: str) -> Manifest:
        """One page as plain JSON: the client's models refuse objects of servers much older or newer."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        options = {"limit": PAGE_OBJECTS, "_request_timeout": REQUEST_TIMEOUT_S, "_preload_content": False}
        try:
            page = json.loads(call(**options, **where).data)
        except ApiException as error:
            if error.status in (401, 403):
                raise self._forbidden(resource, error.status) from error
            message = f"Kubernetes answers {error.status} ({error.reason}) when {resource} are listed"
            raise NotReady(message) from error
        except (HTTPError, ValueError) as error:
            raise NotReady(f"the Kubernetes API server cannot be reached: {error}") from error
        return _mapping(page)

    def _forbidden(self, resource: str, status: int) -> ConfigError:
        scope = (
            f"in namespace {self._namespace}"
            if resource == "pods"
            else "in the whole cluster (a ClusterRole)"
        )
        return ConfigError(
            field="topology.source",
            wanted=f"a service account that may get and list {resource} {scope}",
            given=f"HTTP {status}",
            hint="set rbac.create in the chart, or topology.source to ray",
        )

    def _log_unmapped(self, node: RayNode) -> None:
        if node.node_id in self._unmapped:
            return
        self._unmapped.add(node.node_id)
        logger.warning(
            "Ray node %s at %s is no pod of namespace %s; its Ray labels are used",
            node.node_id,
            node.address,
            self._namespace,
        )


def _mapping(page: object) -> Manifest:
    if not isinstance(page, dict):
        raise NotReady(f"the Kubernetes API server answers no list but {type(page).__name__}")
    return page


def _addresses(status: Manifest) -> list[str]:
    """Every address of a pod: one, or one of each IP family."""
    several = [item["ip"] for item in status.get("podIPs") or [] if item.get("ip")]
    return several or ([status["podIP"]] if status.get("podIP") else [])
