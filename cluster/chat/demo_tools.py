"""The tools that the model in the box knows: a calculator, made-up weather, made-up people."""

import ast
import hashlib
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType

_OPERATORS: Mapping[type[ast.AST], Callable[..., int | float]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }
)
_MAX_CHARS = 200
_SKIES = ("sun", "rain", "snow", "clouds", "wind", "fog")
_CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Cairo", "Lima", "Boston")
_JOBS = ("baker", "doctor", "teacher", "farmer", "pilot", "nurse", "painter", "writer")


def calculator(expression: str) -> str:
    """Evaluates an expression."""
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"wanted at most {_MAX_CHARS} characters, got {len(expression)}")
    return str(_value(ast.parse(expression, mode="eval").body))


def _value(node: ast.AST) -> int | float:
    """Numbers, + - * / // % and parentheses; nothing else is run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("wanted numbers, + - * / // % and parentheses")


def weather(city: str) -> dict[str, object]:
    """The weather in a city."""
    digest = _digest(city)
    return {"city": city, "temp_c": digest[0] % 36, "sky": _SKIES[digest[1] % len(_SKIES)]}


def lookup(name: str, field: str) -> dict[str, object]:
    """Looks up a person."""
    digest = _digest(name)
    person: dict[str, object] = {
        "phone": f"555-{1000 + int.from_bytes(digest[:2], 'big') % 9000}",
        "age": 18 + digest[2] % 70,
        "city": _CITIES[digest[3] % len(_CITIES)],
        "job": _JOBS[digest[4] % len(_JOBS)],
    }
    if field not in person:
        raise ValueError(f"wanted one of {', '.join(person)}, got {field}")
    return {field: person[field]}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
