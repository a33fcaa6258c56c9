"""The chart's value types: what they refuse, and the schema made of them."""

from typing import Any

import jsonschema
import pytest

from cluster.config import MorayConfig
from cluster.helm_values import ChartConfig, HelmValues
from cluster.render import helm_schema
from wire.errors import ConfigError

SCHEMA = helm_schema()


def definition(schema: dict[str, Any], *path: str) -> dict[str, Any]:
    """The schema of a key below the top, through references."""
    for key in path:
        schema = schema["properties"][key]
        while "allOf" in schema or "$ref" in schema:
            reference = schema.get("$ref") or schema["allOf"][0]["$ref"]
            schema = SCHEMA["definitions"][reference.rsplit("/", 1)[-1]]
    return schema


def test_schema_is_valid_draft7() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].startswith("http://json-schema.org/draft-07/")


def test_schema_refuses_unknown_keys_in_every_section() -> None:
    sections = [SCHEMA, *SCHEMA["definitions"].values()]
    assert all(section["additionalProperties"] is False for section in sections if "properties" in section)


def test_schema_has_no_key_beside_a_reference() -> None:
    def references(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = [node] if "$ref" in node else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for item in node for found in references(item)] if isinstance(node, list) else []

    assert references(SCHEMA)
    assert all(set(node) == {"$ref"} for node in references(SCHEMA))


def test_config_section_has_the_keys_of_the_config() -> None:
    assert set(definition(SCHEMA, "config")["properties"]) == set(MorayConfig.model_fields)


def test_config_of_the_chart_is_a_config() -> None:
    dumped = ChartConfig().model_dump()
    assert MorayConfig.from_mapping(dumped).model_dump() == dumped


@pytest.mark.parametrize("group", ["expert", "prefill", "decode", "both"])
def test_each_group_of_workers_is_bound_to_its_pods(group: str) -> None:
    assert getattr(ChartConfig(), group).node_selector == {"moray.io/group": group}


@pytest.mark.parametrize("key", ["description", "default", "minimum"])
def test_schema_tells_users_what_a_value_means(key: str) -> None:
    assert key in definition(SCHEMA, "groups", "expert")["properties"]["pods"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"backend": "ray"}, "backend"),
        ({"config": {"router": {"replicas": 1}}}, "config.router.replicas"),
        ({"config": {"controller": {"port": 0}}}, "config.controller.port"),
        ({"groups": {"expert": {"pods": -1}}}, "groups.expert.pods"),
        ({"head": {"resources": {"limits": {"cpu": 2}}}}, "head.resources.limits.cpu"),
        ({"ray": {"startupSeconds": 60}}, "ray.startupSeconds"),
        ({"fullnameOverride": "x" * 41}, "fullnameOverride"),
    ],
)
def test_wrong_value_is_refused_by_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HelmValues.from_mapping(values)
    assert caught.value.field == field
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(values)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'expert'"):
        HelmValues.from_mapping({"groups": {"experts": {}}})
