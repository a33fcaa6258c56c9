"""Every value set renders on every backend into objects that Kubernetes and KubeRay take."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUE_SETS = ["", "cpu-demo", "native", "h200-8gpu", "wide-ep-18-nodes", "everything"]
BACKENDS = [
    ("backend=kuberay",),
    ("backend=kuberay", "kuberay.kind=RayJob"),
    ("backend=native",),
]
API_VERSIONS_1_20 = {
    "v1",
    "apps/v1",
    "rbac.authorization.k8s.io/v1",
    "networking.k8s.io/v1",
    "policy/v1beta1",
}
NEWER_THAN_1_20 = {
    "grpc",
    "hostUsers",
    "internalTrafficPolicy",
    "matchLabelKeys",
    "maxUnavailableReplicas",
    "minDomains",
    "minReadySeconds",
    "persistentVolumeClaimRetentionPolicy",
    "resizePolicy",
    "schedulingGates",
    "trafficDistribution",
    "unhealthyPodEvictionPolicy",
}
"""Fields of these objects that came after Kubernetes 1.20."""


def is_native(item: dict[str, Any]) -> bool:
    """Whether the object belongs to Kubernetes itself."""
    return "monitoring.coreos.com" not in item["apiVersion"] and "ray.io" not in item["apiVersion"]


@pytest.mark.parametrize("values", VALUE_SETS)
def test_lint_strict_passes(values, run_helm):
    path = ROOT / "tests" / "helm" / f"{values}.yaml"
    path = path if path.exists() else ROOT / "helm" / "moray" / "examples" / f"{values}.yaml"
    result = run_helm(
        "lint", "--strict", str(ROOT / "helm" / "moray"), *(["--values", str(path)] if values else [])
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout


def test_every_example_is_tested():
    found = {path.stem for path in (ROOT / "helm" / "moray" / "examples").glob("*.yaml")}
    assert found <= set(VALUE_SETS)


@pytest.mark.parametrize("kube_version", ["1.20.0", "1.37.0"])
@pytest.mark.parametrize("settings", BACKENDS, ids=lambda s: s[-1].split("=")[1])
@pytest.mark.parametrize("values", VALUE_SETS)
def test_objects_match_schemas(values, settings, kube_version, render, manifest_errors):
    objects = render(values, *settings, kube_version=kube_version).objects
    schema = "1.25" if kube_version == "1.20.0" else "1.37"
    checked = [item for item in objects if "monitoring.coreos.com" not in item["apiVersion"]]
    wrong = {f"{o['kind']}/{o['metadata']['name']}": manifest_errors(o, schema) for o in checked}
    assert {name: errors for name, errors in wrong.items() if errors} == {}
    assert len(checked) >= 14


@pytest.mark.parametrize("values", VALUE_SETS)
def test_kubernetes_1_20_knows_every_object_and_field(values, render):
    objects = render(values, "backend=native", kube_version="1.20.0").objects
    objects = [item for item in objects if is_native(item)]
    assert {item["apiVersion"] for item in objects} <= API_VERSIONS_1_20
    used = {key for item in objects if item["kind"] != "ConfigMap" for key in all_keys(item)}
    assert used & NEWER_THAN_1_20 == set()


def all_keys(node: Any) -> Iterator[str]:
    """Every key at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from all_keys(value)
    elif isinstance(node, list):
        for item in node:
            yield from all_keys(item)


def test_disruption_budget_is_v1_where_it_exists(render):
    new = render("native").of_kind("PodDisruptionBudget")
    assert {item["apiVersion"] for item in new} == {"policy/v1"}


def test_native_needs_no_custom_resource(render):
    assert all(is_native(item) for item in render("native").objects)


@pytest.mark.parametrize("settings", BACKENDS, ids=lambda s: s[-1].split("=")[1])
def test_same_values_render_the_same_objects(settings, render, run_helm):
    settings = (*settings, "auth.existingSecret=s")
    again = render("", *settings, "fullnameOverride=").stdout
    assert render("", *settings).stdout == again


def test_prometheus_objects_name_real_ports_and_labels(render):
    result = render("everything")
    service = next(s for s in result.of_kind("Service") if s["metadata"]["name"] == "rel-moray-router")
    monitor = result.of_kind("ServiceMonitor")[0]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {e["port"] for e in monitor["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    config = result.of_kind("ScrapeConfig")[0]["spec"]
    assert config["httpSDConfigs"][0]["url"] == "http://rel-moray-router.ns.svc:9091/sd"


def test_pod_monitor_finds_its_ports(render, pods_of: Callable[..., Any]):
    result = render("everything")
    spec = result.of_kind("PodMonitor")[0]["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    pods = [p for _, p in pods_of(result.objects) if wanted <= p["metadata"].get("labels", {}).items()]
    names = {p["name"] for pod in pods for c in pod["spec"]["containers"] for p in c.get("ports", [])}
    assert {e["port"] for e in spec["podMetricsEndpoints"]} <= names
