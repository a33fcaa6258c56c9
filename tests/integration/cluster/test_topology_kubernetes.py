"""The Kubernetes topology reader with the real client against a small API server on loopback."""

import json
import logging
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes import client
from kubernetes.config import incluster_config

from cluster.config import TopologyConfig
from cluster.topology.kubernetes import KubernetesTopology, make_kubernetes_topology
from cluster.topology.types import RayNode
from wire.errors import ConfigError, NotReady

CONFIG = TopologyConfig()


def pod(name: str, ip: str, node: str, *, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """A pod as the API server lists it, cut down to what matters."""
    return {
        "metadata": {"name": name},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": phase, "podIP": ip, **status},
    }


def node(name: str, **labels: str) -> dict[str, Any]:
    """A node as an API server lists it; `images` without names break the client's own models."""
    return {"metadata": {"name": name, "labels": labels}, "status": {"images": [{"names": None}]}}


class ApiServer:
    """Two lists, in pages of two objects, and whatever status a test asks for."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.nodes: list[dict[str, Any]] = []
        self.statuses: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        self.requests.append((url.path, handler.headers.get("authorization", "")))
        lists = {"/api/v1/namespaces/ns/pods": self.pods, "/api/v1/nodes": self.nodes}
        status = self.statuses.get(url.path, 200 if url.path in lists else 404)
        start = int(parse_qs(url.query).get("continue", ["0"])[0])
        items = lists.get(url.path, [])
        more = {"continue": str(start + 2)} if start + 2 < len(items) else {}
        body = json.dumps({"kind": "List", "metadata": more, "items": items[start : start + 2]}).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    server.thread.start()
    yield server
    server.stop()


@pytest.fixture
def topology(api: ApiServer) -> KubernetesTopology:
    settings = client.Configuration(host=f"http://127.0.0.1:{api.port}")
    settings.retries = False
    return KubernetesTopology(client.CoreV1Api(client.ApiClient(settings)), namespace="ns", config=CONFIG)


ZONE, RACK, GPU = CONFIG.zone_label, CONFIG.rack_label, CONFIG.accelerator_label


def test_nodes_stand_where_their_pods_are(api: ApiServer, topology: KubernetesTopology) -> None:
    api.pods = [pod(f"p{i}", f"10.0.0.{i}", f"machine-{i % 3}") for i in range(5)]
    api.nodes = [node(f"machine-{i}", **{ZONE: f"z{i % 2}", RACK: f"r{i}", GPU: "H200"}) for i in range(3)]
    rays = [RayNode(f"n{i}", f"10.0.0.{i}", f"p{i}", {"moray.io/group": "expert"}) for i in (4, 0, 3)]
    found = topology.read(rays)
    assert [place.node_id for place in found] == ["n4", "n0", "n3"]
    assert [place.host for place in found] == ["machine-1", "machine-0", "machine-0"]
    assert found[1].failure_domain == found[2].failure_domain == ("z0", "r0", "machine-0")
    assert found[0].accelerator == "H200"
    assert found[0].labels["moray.io/group"] == "expert"
    assert topology.num_unmapped == 0
    assert len(api.requests) == 3 + 2, "five pods and three nodes are five pages of two"


def test_dual_stack_pods_are_found_by_either_address(api: ApiServer, topology: KubernetesTopology) -> None:
    api.pods = [pod("p", "10.0.0.1", "m", podIPs=[{"ip": "10.0.0.1"}, {"ip": "fd00::1"}])]
    api.nodes = [node("m", **{ZONE: "z"})]
    assert [place.zone for place in topology.read([RayNode("a", "fd00::1"), RayNode("b", "10.0.0.1")])] == [
        "z",
        "z",
    ]


def test_finished_pods_do_not_own_their_address(api: ApiServer, topology: KubernetesTopology) -> None:
    api.pods = [pod("new", "10.0.0.1", "m2"), pod("old", "10.0.0.1", "m1", phase="Succeeded")]
    api.nodes = [node("m1"), node("m2")]
    assert topology.read([RayNode("a", "10.0.0.1")])[0].host == "m2"


def test_unknown_nodes_keep_their_ray_labels_and_are_logged_once(
    api: ApiServer, topology: KubernetesTopology, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stranger = RayNode("s", "192.168.0.9", "far", {ZONE: "edge"})
    for _ in range(2):
        assert topology.read([stranger])[0].failure_domain == ("edge", "", "far")
    assert len(caplog.records) == 1
    assert "192.168.0.9" in caplog.text
    assert topology.num_unmapped == 1


def test_missing_node_labels_are_filled_from_ray_labels(api: ApiServer, topology: KubernetesTopology) -> None:
    api.pods, api.nodes = [pod("p", "10.0.0.1", "m")], [node("m")]
    (found,) = topology.read([RayNode("a", "10.0.0.1", labels={RACK: "r9"})])
    assert found.failure_domain == ("", "r9", "m")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("path", "resource"), [("/api/v1/namespaces/ns/pods", "pods"), ("/api/v1/nodes", "nodes")]
)
def test_missing_right_is_named(
    path: str, resource: str, status: int, api: ApiServer, topology: KubernetesTopology
) -> None:
    api.statuses[path] = status
    with pytest.raises(ConfigError, match=f"get and list {resource}.*HTTP {status}.*rbac.create"):
        topology.read([RayNode("a", "10.0.0.1")])


def test_failing_server_is_worth_another_try(api: ApiServer, topology: KubernetesTopology) -> None:
    api.statuses["/api/v1/nodes"] = 503
    with pytest.raises(NotReady, match="503"):
        topology.read([])
    del api.statuses["/api/v1/nodes"]
    assert topology.read([]) == []


def test_unreachable_server_is_worth_another_try(api: ApiServer, topology: KubernetesTopology) -> None:
    api.server.server_close()
    api.server.shutdown()
    with pytest.raises(NotReady, match="cannot be reached"):
        topology.read([])


def make_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key in one file, signed by itself."""
    path = folder / "server.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]
    command = ["openssl", "req", "-x509", *key, *subject, "-days", "2", "-out", str(folder / "ca.crt")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + (folder / "ca.crt").read_text())
    return path


def test_pod_uses_its_own_identity_and_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = ApiServer()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(make_certificate(tmp_path))
    api.server.socket = tls.wrap_socket(api.server.socket, server_side=True)
    api.thread.start()
    (tmp_path / "token").write_text("secret-token")
    (tmp_path / "namespace").write_text("ns\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    try:
        assert make_kubernetes_topology(CONFIG, account_dir=tmp_path).read([]) == []
    finally:
        api.stop()
    assert api.requests == [
        ("/api/v1/namespaces/ns/pods", "bearer secret-token"),
        ("/api/v1/nodes", "bearer secret-token"),
    ]
