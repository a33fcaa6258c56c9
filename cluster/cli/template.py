"""`moray template`: V3.2's chat format, JSON lines in and out: what a model is shown, how it is read."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import typer

from router.front.chat.encoding import encode_messages
from router.front.chat.parsing import parse_reply
from wire.errors import InvalidRequest

app = typer.Typer(help="V3.2's chat format: JSON lines on stdin and stdout.", no_args_is_help=True)

_ENCODE_KEYS = ("messages", "thinking_mode", "context", "drop_thinking", "add_default_bos_token")
_PARSE_KEYS = ("text", "thinking_mode")


@app.command("encode")
def encode() -> None:
    """Messages to prompts: {"messages", "thinking_mode", ...} -> {"prompt"}, a line each."""
    _answer_lines(sys.stdin, encode_line)


@app.command("parse")
def parse() -> None:
    """Replies to their parts: {"text", "thinking_mode"} -> {"content", "reasoning_content", "tool_calls"}."""
    _answer_lines(sys.stdin, parse_line)


def _answer_lines(lines: Iterable[str], answer: Callable[[str], dict[str, Any]]) -> None:
    """A refused line gives {"error"}, and the next line is read."""
    for line in lines:
        if not line.strip():
            continue
        try:
            answered = answer(line)
        except InvalidRequest as error:
            answered = {"error": error.message}
        sys.stdout.write(json.dumps(answered, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def encode_line(line: str) -> dict[str, Any]:
    """The prompt of one line.

    Raises:
        InvalidRequest: the line or its messages do not fit the format.
    """
    asked = _object(line, _ENCODE_KEYS, required=("messages", "thinking_mode"))
    for key in ("messages", "context"):
        if not isinstance(asked.get(key, []), list):
            raise InvalidRequest(f"{key}: wanted a list, got {type(asked[key]).__name__}", field=key)
    return {"prompt": encode_messages(asked.pop("messages"), **asked)}


def parse_line(line: str) -> dict[str, Any]:
    """The parts of the reply of one line.

    Raises:
        InvalidRequest: the line is not what was asked for, or the reply leaves the format anywhere.
    """
    asked = _object(line, _PARSE_KEYS, required=_PARSE_KEYS)
    if not isinstance(asked["text"], str):
        raise InvalidRequest(f"text: wanted a text, got {type(asked['text']).__name__}", field="text")
    reply = parse_reply(asked["text"], thinking_mode=asked["thinking_mode"])
    if reply.problem is not None:
        raise InvalidRequest(f"text: {reply.problem}", field="text")
    return {
        "role": "assistant",
        "content": reply.content,
        "reasoning_content": reply.reasoning_content,
        "tool_calls": list(reply.tool_calls),
    }


def _object(line: str, known: tuple[str, ...], *, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"wanted a JSON object a line, got {type(value).__name__}")
    for key in value:
        if key not in known:
            raise InvalidRequest(f"{key}: unknown; known are {', '.join(known)}", field=key)
    for key in required:
        if key not in value:
            raise InvalidRequest(f"{key}: missing", field=key)
    return value
