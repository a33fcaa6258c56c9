"""What is generated for Kubernetes: the chart's values schema and the plain manifests in k8s/.

    python -m cluster.render schema                  writes helm/moray/values.schema.json
    python -m cluster.render manifests --helm BIN    writes k8s/*.yaml with that helm

Both are committed; tests/helm renders them again and compares.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.helm_values import HelmValues
from wire.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "moray"
SCHEMA_PATH = CHART / "values.schema.json"
MANIFEST_DIR = ROOT / "k8s"
SECRET_NAME = "moray-ray-token"
KUBE_VERSION = "1.37.0"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One file of plain manifests: the chart with these values."""

    file_name: str
    about: str
    values_file: str
    settings: tuple[str, ...] = ()
    kube_version: str = KUBE_VERSION


SAMPLES = (
    Sample(
        file_name="native.yaml",
        about="Moray without any operator or custom resource, Kubernetes 1.21 or later.",
        values_file="native.yaml",
    ),
    Sample(
        file_name="raycluster.yaml",
        about="Moray as a RayCluster, for KubeRay 1.6 or later.",
        values_file="cpu-demo.yaml",
    ),
    Sample(
        file_name="rayjob.yaml",
        about="Moray submitted to a cluster of its own as a RayJob, for KubeRay 1.6 or later.",
        values_file="cpu-demo.yaml",
        settings=("kuberay.kind=RayJob",),
    ),
)


def helm_schema() -> dict[str, Any]:
    """The JSON schema (draft 7) of every value of the chart, unknown keys refused."""
    schema = HelmValues.model_json_schema(by_alias=True, ref_template="#/definitions/{model}")
    schema["definitions"] = schema.pop("$defs")
    schema = _to_draft7(schema)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _to_draft7(node: Any) -> Any:
    """Draft 7 ignores what stands beside a $ref, and titles only repeat the keys."""
    if isinstance(node, list):
        return [_to_draft7(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _to_draft7(value) for key, value in node.items() if not _is_title(key, value)}
    reference = out.pop("$ref", None)
    if reference is None:
        return out
    return {"allOf": [{"$ref": reference}], **out} if out else {"$ref": reference}


def _is_title(key: str, value: object) -> bool:
    return key == "title" and isinstance(value, str)


def schema_text() -> str:
    """What values.schema.json holds."""
    return json.dumps(helm_schema(), indent=2, sort_keys=True) + "\n"


def render_chart(
    helm: Path, *, values: Sequence[Path] = (), settings: Sequence[str] = (), kube_version: str = KUBE_VERSION
) -> str:
    """The chart's manifests as release `moray` in namespace `moray`, without Helm's own test hooks.

    Raises:
        ConfigError: helm refuses the values; its message is included.
    """
    command = [str(helm), "template", "moray", str(CHART), "--namespace", "moray", "--skip-tests"]
    command += ["--kube-version", kube_version]
    command += [part for path in values for part in ("--values", str(path))]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(field="values", wanted="values that the chart takes", given=done.stderr.strip())
    return done.stdout


def manifest_text(helm: Path, sample: Sample) -> str:
    """What the file of a sample in k8s/ holds."""
    values_path = CHART / "examples" / sample.values_file
    settings = (f"auth.existingSecret={SECRET_NAME}", *sample.settings)
    text = render_chart(helm, values=[values_path], settings=settings, kube_version=sample.kube_version)
    text = re.sub(r"^ *helm\.sh/chart: .*\n", "", text, flags=re.MULTILINE)
    text = text.replace("app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl")
    return _header(sample) + text.lstrip("-\n")


def _header(sample: Sample) -> str:
    make_secret = (
        f"kubectl -n moray create secret generic {SECRET_NAME} "
        "--from-literal=auth_token=$(openssl rand -hex 24)"
    )
    return (
        f"# {sample.about}\n"
        f"# Rendered from helm/moray with examples/{sample.values_file}: change the chart, not this file,\n"
        "# and run `python -m cluster.render manifests`.\n"
        "#\n"
        "#   kubectl create namespace moray\n"
        f"#   {make_secret}\n"
        f"#   kubectl apply -f k8s/{sample.file_name}\n"
        "---\n"
    )


def write_schema() -> Path:
    """Write the chart's schema and say where."""
    SCHEMA_PATH.write_text(schema_text())
    return SCHEMA_PATH


def write_manifests(helm: Path) -> list[Path]:
    """Write every sample into k8s/ and say where."""
    paths = []
    for sample in SAMPLES:
        path = MANIFEST_DIR / sample.file_name
        path.write_text(manifest_text(helm, sample))
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Generate what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.render", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["schema", "manifests"])
    parser.add_argument("--helm", default="helm", help="the helm binary (manifests only)")
    args = parser.parse_args(argv)
    if args.what == "schema":
        paths = [write_schema()]
    else:
        helm = shutil.which(args.helm)
        if helm is None:
            raise ConfigError(field="--helm", wanted="an executable helm", given=args.helm)
        paths = write_manifests(Path(helm))
    for path in paths:
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
