"""Topology from Ray labels, and the choice of who reads it."""

import logging
from collections.abc import Sequence

import pytest

from cluster.config import TopologyConfig
from cluster.topology.kubernetes import is_in_cluster
from cluster.topology.ray_labels import RayTopology, read_ray_topology
from cluster.topology.reader import make_topology_reader
from cluster.topology.types import NodeTopology, RayNode
from wire.errors import ConfigError, MorayError, NotReady

CONFIG = TopologyConfig()
GPU_NODE = RayNode(
    node_id="aa",
    address="10.0.0.1",
    host="gpu-1",
    labels={
        "topology.kubernetes.io/zone": "z1",
        "topology.kubernetes.io/rack": "r2",
        "nvidia.com/gpu.product": "NVIDIA-H200",
    },
    resources={"GPU": 8.0},
)
BARE_NODE = RayNode(node_id="bb", address="10.0.0.2")


class FakeReader:
    """Answers, or fails, as told."""

    def __init__(self, *answers: MorayError | str) -> None:
        self.answers = list(answers)

    def read(self, nodes: Sequence[RayNode]) -> list[NodeTopology]:
        answer = self.answers.pop(0)
        if isinstance(answer, MorayError):
            raise answer
        return [NodeTopology(node_id=n.node_id, address=n.address, host=answer) for n in nodes]


def test_labels_say_zone_rack_and_accelerator() -> None:
    (found,) = read_ray_topology([GPU_NODE], CONFIG)
    assert (found.zone, found.rack, found.accelerator) == ("z1", "r2", "NVIDIA-H200")
    assert found.failure_domain == ("z1", "r2", "gpu-1")


def test_bare_node_stands_alone_at_its_address() -> None:
    (found,) = read_ray_topology([BARE_NODE], CONFIG)
    assert found.failure_domain == ("", "", "10.0.0.2")
    assert found.accelerator == ""


def test_accelerator_falls_back_to_rays_own_label() -> None:
    node = RayNode(node_id="cc", address="a", labels={"ray.io/accelerator-type": "H200"})
    assert read_ray_topology([node], CONFIG)[0].accelerator == "H200"


def test_configured_label_names_are_used() -> None:
    node = RayNode(node_id="cc", address="a", labels={"site": "east", "row": "7"})
    (found,) = read_ray_topology([node], TopologyConfig(zone_label="site", rack_label="row"))
    assert (found.zone, found.rack) == ("east", "7")


def test_order_is_kept() -> None:
    found = read_ray_topology([BARE_NODE, GPU_NODE], CONFIG)
    assert [node.node_id for node in found] == ["bb", "aa"]


@pytest.mark.parametrize(("source", "in_cluster"), [("ray", True), ("ray", False), ("auto", False)])
def test_ray_labels_are_read_outside_kubernetes_or_when_asked(source: str, in_cluster: bool) -> None:
    config = TopologyConfig.from_mapping({"source": source})
    reader = make_topology_reader(config, in_cluster=lambda: in_cluster, make_kubernetes=_never)
    assert isinstance(reader, RayTopology)


def _never(config: TopologyConfig) -> FakeReader:
    raise AssertionError("Kubernetes was asked")


def test_auto_in_a_pod_reads_kubernetes() -> None:
    reader = make_topology_reader(
        CONFIG, in_cluster=lambda: True, make_kubernetes=lambda _: FakeReader("k8s")
    )
    assert [node.host for node in reader.read([GPU_NODE])] == ["k8s"]


def test_auto_falls_back_to_ray_labels_and_logs_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fake = FakeReader(NotReady("down"), NotReady("down"), "k8s")
    reader = make_topology_reader(CONFIG, in_cluster=lambda: True, make_kubernetes=lambda _: fake)
    hosts = [reader.read([GPU_NODE])[0].host for _ in range(3)]
    assert hosts == ["gpu-1", "gpu-1", "k8s"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_kubernetes_source_raises_instead_of_falling_back() -> None:
    config = TopologyConfig(source="kubernetes")
    fake = FakeReader(NotReady("down"))
    reader = make_topology_reader(config, make_kubernetes=lambda _: fake)
    with pytest.raises(NotReady):
        reader.read([GPU_NODE])


def test_kubernetes_source_outside_a_pod_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"topology\.source"):
        make_topology_reader(TopologyConfig(source="kubernetes"))


def test_pod_needs_both_the_api_server_and_a_token(tmp_path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    assert not is_in_cluster(environ, tmp_path)
    (tmp_path / "token").write_text("t")
    assert is_in_cluster(environ, tmp_path)
    assert not is_in_cluster({}, tmp_path)
