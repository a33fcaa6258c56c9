"""The base of every config type: frozen, strict, and clear about what is wrong."""

import pytest
from pydantic import ValidationError

from wire.config import FrozenConfig
from wire.errors import ConfigError


class Inner(FrozenConfig):
    """A section."""

    num_pages: int = 4
    """Pages."""


class Outer(FrozenConfig):
    """A whole config."""

    inner: Inner = Inner()
    """The section."""
    share: float = 0.5
    """A part of one."""


def test_mapping_becomes_a_config():
    assert Outer.from_mapping({"inner": {"num_pages": 9}}) == Outer(inner=Inner(num_pages=9))


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Outer().share = 0.7


@pytest.mark.parametrize(
    ("raw", "field", "hint"),
    [
        ({"shares": 1}, "shares", "did you mean 'share'?"),
        ({"inner": {"num_page": 1}}, "inner.num_page", "did you mean 'num_pages'?"),
        ({"zzz": 1}, "zzz", "known keys: inner, share"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(raw, field, hint):
    with pytest.raises(ConfigError) as caught:
        Outer.from_mapping(raw)
    assert caught.value.field == field
    assert hint in caught.value.message


@pytest.mark.parametrize(
    ("raw", "field", "given"),
    [
        ({"share": "half"}, "share", "'half'"),
        ({"share": float("nan")}, "share", "nan"),
        ({"inner": {"num_pages": 1.5}}, "inner.num_pages", "1.5"),
        ({"inner": 3}, "inner", "3"),
    ],
)
def test_wrong_value_names_the_field_and_what_was_given(raw, field, given):
    with pytest.raises(ConfigError) as caught:
        Outer.from_mapping(raw)
    assert caught.value.field == field
    assert given in caught.value.message


def test_docstrings_become_descriptions():
    assert Outer.model_json_schema()["properties"]["share"]["description"] == "A part of one."
