"""Python functions as tools of a chat: their JSON schemas, and calls that never raise."""

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin, get_type_hints

from wire.errors import ConfigError

_JSON_TYPES: Mapping[type, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


@dataclass(frozen=True)
class Tool:
    """One function."""

    name: str
    schema: Mapping[str, Any]
    """As a request carries it: {"type": "function", "function": {"name", "description", "parameters"}}."""
    function: Callable[..., object]


def make_tool(function: Callable[..., object]) -> Tool:
    """A function as a tool: the description is its docstring's first line, the parameters its type hints.

    Raises:
        ConfigError: a parameter has no type that JSON knows.
    """
    name = function.__name__
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    properties = {key: {"type": _json_type(name, key, hints.get(key))} for key in parameters}
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    description = (inspect.getdoc(function) or "").partition("\n")[0]
    return Tool(
        name,
        {"type": "function", "function": {"name": name, "description": description, "parameters": schema}},
        function,
    )


def _json_type(function: str, parameter: str, hint: Any) -> str:
    found = _JSON_TYPES.get(get_origin(hint) or hint)
    if found is None:
        wanted = ", ".join(kind.__name__ for kind in _JSON_TYPES)
        raise ConfigError(
            field=f"{function}({parameter})", wanted=f"a type hint, one of {wanted}", given=str(hint)
        )
    return found


def load_tools(path: Path) -> list[Tool]:
    """The public functions that a Python file defines, in its order.

    Raises:
        ConfigError: the file cannot be run, or defines no public function.
    """
    module = _run_file(path)
    functions = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not functions:
        raise ConfigError(field="--tools", wanted="a file that defines public functions", given=str(path))
    return [make_tool(function) for function in functions]


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("moray_chat_tools", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(field="--tools", wanted="a Python file", given=str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        given = f"{path}: {type(error).__name__}: {error}"
        raise ConfigError(field="--tools", wanted="a Python file that runs", given=given) from error
    return module


def run_call(tools: Sequence[Tool], name: str, arguments: str) -> str:
    """What the model is told of its call: the result as text or JSON, or what went wrong.

    Args:
        tools: those on offer.
        name: the tool that was called.
        arguments: the text of a JSON object, as the model wrote it.
    """
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        known = ", ".join(tool.name for tool in tools) or "none"
        return f"error: there is no tool {name}; there are: {known}"
    try:
        result = tool.function(**json.loads(arguments))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is told to the model
        return f"error: {type(error).__name__}: {error}"
