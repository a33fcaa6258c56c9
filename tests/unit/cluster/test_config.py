"""The whole config: what a YAML file and flags may say, and how it is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import MorayConfig, load_config
from wire.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes the text of a config file and says where."""

    def written(text: str) -> Path:
        path = tmp_path / "moray.yaml"
        path.write_text(text)
        return path

    return written


def fields_of(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, description) of every field below a section."""
    found = []
    for name, field in section.model_fields.items():
        found.append((prefix + name, field.description or ""))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += fields_of(field.annotation, f"{prefix}{name}.")
    return found


def test_no_file_gives_the_defaults_and_they_serve() -> None:
    config = load_config(None)
    config.check_serves()
    counts = (config.expert.replicas, config.prefill.replicas, config.decode.replicas, config.both.replicas)
    assert counts == (2, 1, 1, 0)


def test_file_sets_what_it_names_and_nothing_else(write: Any) -> None:
    config = load_config(write("name: demo\nexpert: {replicas: 5}\n"))
    assert (config.name, config.expert.replicas) == ("demo", 5)
    plain = MorayConfig().model_dump()
    assert config.model_dump() == plain | {"name": "demo", "expert": plain["expert"] | {"replicas": 5}}


def test_empty_file_gives_the_defaults(write: Any) -> None:
    assert load_config(write("# nothing\n")) == MorayConfig()


def test_override_wins_over_the_file_and_keeps_its_neighbours(write: Any) -> None:
    path = write("expert: {replicas: 5, num_slots: 9}\n")
    config = load_config(path, overrides={"expert.replicas": 3, "model": "m", "decode.replicas": 2})
    assert (config.expert.replicas, config.expert.num_slots) == (3, 9)
    assert (config.model, config.decode.replicas) == ("m", 2)


def test_override_of_none_is_skipped(write: Any) -> None:
    assert load_config(write("model: m\n"), overrides={"model": None, "expert.replicas": None}).model == "m"


def test_override_below_a_section_that_is_no_mapping_is_refused(write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write("expert: 3\n"), overrides={"expert.replicas": 2})
    assert caught.value.message == "config field 'expert': wanted a mapping; got 3"


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("modle: m", "modle", "did you mean 'model'?"),
        ("expert: {replica: 3}", "expert.replica", "did you mean 'replicas'?"),
        ("router: {grpcport: 1}", "router.grpcport", "did you mean 'grpc_port'?"),
        ("decode: {page_tokens: 16}", "decode.page_tokens", "did you mean 'max_step_tokens'?"),
        ("mtp: {xyz: 1}", "mtp.xyz", "known keys: max_drafts, zero_first_embedding"),
    ],
)
def test_unknown_key_names_the_nearest_at_any_depth(write: Any, text: str, field: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.field == field
    assert hint in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "expert: {replicas: 0}",
            "config field 'expert.replicas': wanted greater than or equal to 1; got 0",
        ),
        (
            "router: {grpc_port: 65536}",
            "config field 'router.grpc_port': wanted less than or equal to 65535; got 65536",
        ),
        (
            "kv: {page_tokens: []}",
            "config field 'kv.page_tokens': wanted a valid integer; got []",
        ),
        (
            "dispatch: {combine: fp16}",
            "config field 'dispatch.combine': wanted 'exact', 'fp32' or 'bf16'; got 'fp16'",
        ),
        (
            "expert: {node_selector: {rack: 7}}",
            "config field 'expert.node_selector.rack': wanted a valid string; got 7",
        ),
        (
            "name: " + 41 * "x",
            f"config field 'name': wanted String should have at most 40 characters; got {41 * 'x'!r}",
        ),
        (
            "controller: {start_s: .inf}",
            "config field 'controller.start_s': wanted a finite number; got inf",
        ),
    ],
)
def test_wrong_value_says_field_wanted_and_given(write: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert caught.value.message == message


@pytest.mark.parametrize("text", ["- a\n", "[]\n", "text\n", "0\n", "false\n"])
def test_file_that_is_no_mapping_is_refused(write: Any, text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"'--config': wanted a mapping at the top level; got (list|str|int|bool)"
    ):
        load_config(write(text))


@pytest.mark.parametrize("content", [b"a: [1\nb: }\n", b"\xff\xfe\x00", b"a: b: c\n", None])
def test_unreadable_file_is_named_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "moray.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.field == "--config"
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_config_is_frozen_at_every_depth() -> None:
    config = load_config(None)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]  # what is under test
    with pytest.raises(ValidationError, match="frozen"):
        config.expert.replicas = 3  # type: ignore[misc]  # what is under test


def test_config_survives_yaml(write: Any) -> None:
    config = load_config(None, overrides={"expert.node_selector": {"a": "1"}, "kv.page_tokens": 32})
    assert load_config(write(yaml.safe_dump(config.model_dump()))) == config


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_cluster_in_which_a_phase_has_no_worker_is_refused(role: str) -> None:
    config = load_config(None, overrides={f"{role}.replicas": 0})
    with pytest.raises(ConfigError, match=f"nothing can {role}") as caught:
        config.check_serves()
    assert caught.value.field == f"{role}.replicas"


def test_workers_that_do_both_serve_alone() -> None:
    overrides = {"prefill.replicas": 0, "decode.replicas": 0, "both.replicas": 1}
    load_config(None, overrides=overrides).check_serves()


@pytest.mark.parametrize(("name", "description"), fields_of(MorayConfig))
def test_every_field_has_help(name: str, description: str) -> None:
    assert description.endswith("."), f"{name}: no docstring below the field, or not a sentence"
