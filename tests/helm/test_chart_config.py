"""Values, schema, types and the rendered ConfigMap say the same thing."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import MorayConfig, load_config
from cluster.helm_values import HelmValues
from cluster.render import SCHEMA_PATH, helm_schema, schema_text

ROOT = Path(__file__).resolve().parents[2]
VALUES_PATH = ROOT / "helm" / "moray" / "values.yaml"
EXAMPLES = sorted(path.stem for path in (ROOT / "helm" / "moray" / "examples").glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML document."""
    return yaml.safe_load(path.read_text())


def merged(base: Any, over: Any) -> Any:
    """Two value trees as Helm lays one over the other."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {key: merged(base.get(key), over[key]) if key in over else base[key] for key in base | over}
    return over


def config_of(result: Any) -> str:
    """The config file inside the rendered ConfigMap."""
    return result.of_kind("ConfigMap")[0]["data"]["config.yaml"]


def test_schema_file_is_current():
    assert SCHEMA_PATH.read_text() == schema_text(), "run: python -m cluster.render schema"


def test_schema_is_valid_draft7():
    jsonschema.Draft7Validator.check_schema(helm_schema())


def test_values_file_states_every_key_with_the_types_default():
    given = HelmValues.from_mapping(read_yaml(VALUES_PATH)).model_dump(by_alias=True, exclude_unset=True)
    wanted = HelmValues().model_dump(by_alias=True)
    assert flat(given) == flat(wanted), "add the key to helm/moray/values.yaml, with the type's default"


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted key, so that a difference names it."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        k: v for key, value in values.items() for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def test_config_subtree_has_exactly_the_keys_of_the_config():
    assert set(read_yaml(VALUES_PATH)["config"]) == set(MorayConfig.model_fields)


@pytest.mark.parametrize("values", ["", *EXAMPLES])
@pytest.mark.parametrize("backend", ["kuberay", "native"])
def test_config_map_loads_and_equals_the_values(values, backend, render, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_of(render(values, f"backend={backend}")))
    given = read_yaml(ROOT / "helm" / "moray" / "examples" / f"{values}.yaml") if values else {}
    wanted = MorayConfig.from_mapping(merged(read_yaml(VALUES_PATH)["config"], given.get("config", {})))
    config = load_config(path)
    assert config == wanted
    config.check_serves()


@pytest.mark.parametrize("number", [1_000_000, 16_777_216, 123_456_789])
def test_large_numbers_stay_integers(number, render, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_of(render("", f"config.decode.num_pages={number}")))
    assert load_config(path).decode.num_pages == number


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("config.expert.replica=3", "replica"),
        ("config.experts.replicas=3", "experts"),
        ("groups.expert.replicas=3", "replicas"),
        ("groups.expret.pods=3", "expret"),
        ("ruoter.replicas=3", "ruoter"),
        ("config.expert.replicas=0", "minimum"),
        ("config.expert.replicas=many", "integer"),
        ("config.router.replicas=1", "replicas"),
        ("config.controller.port=0", "port"),
        ("backend=ray", "backend"),
        ("auth.mode=none", "mode"),
        ("ray.startupSeconds=60", "startupSeconds"),
        ("head.resources.limits.cpu=2", "cpu"),
    ],
)
def test_wrong_value_is_refused_by_name(setting, named, render):
    result = render("", setting)
    assert result.returncode != 0
    assert named in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["groups.prefill.pods=0"], "groups.prefill.pods is 0"),
        (["config.prefill.replicas=0"], "nothing can prefill"),
        (["config.decode.replicas=0"], "nothing can decode"),
        (["config.model=/models/x"], "no volume holds it"),
        (["weights.type=existingClaim"], "weights.claimName"),
        (["weights.type=hostPath"], "weights.hostPath"),
        (["config.decode.drain_s=50"], "groups.decode.terminationGracePeriodSeconds must be at least 65"),
        (["config.router.drain_s=120"], "router.terminationGracePeriodSeconds must be at least 130"),
        (["config.both.replicas=1"], "groups.both.pods is 0"),
        (["config.decode.node_selector.moray\\.io/group=gpu"], "config.decode.node_selector"),
    ],
)
def test_contradicting_values_are_refused_with_a_reason(settings, message, render):
    result = render("", *settings)
    assert result.returncode != 0
    assert message in result.stderr


def test_subchart_globals_are_accepted(render):
    assert render("", "global.region=eu").returncode == 0


def test_schema_accepts_what_the_types_accept():
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA_PATH.read_text()))
    validator.validate(HelmValues().model_dump(by_alias=True, mode="json"))
