"""The base of every config type: frozen, strict, and clear about what is wrong.

Config is written by strangers (a YAML file, Helm values), so an unknown key names the nearest known
one and every error names the field, what was wanted and what was given.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from wire.errors import ConfigError


class FrozenConfig(BaseModel):
    """A config section: immutable after construction, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Self:
        """The config in a parsed YAML mapping.

        Raises:
            ConfigError: naming the first wrong field, what it wants and what it was given.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise _describe(cls, error) from None


def _describe(root: type[BaseModel], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(path) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _keys_at(root, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return ConfigError(field=field, wanted="a known key", given=path[-1], hint=hint)
    wanted = first["msg"].removeprefix("Input should be ")
    return ConfigError(field=field, wanted=wanted, given=repr(first["input"])[:120])


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    section = root
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
