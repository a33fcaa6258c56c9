"""`moray template`: a line in, a line out; a refused line does not end it."""

import json

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from tests.reference_data import REFERENCE_DIR


def ask(command: str, *lines: str) -> list[dict[str, object]]:
    ran = CliRunner().invoke(app, ["template", command], input="".join(f"{line}\n" for line in lines))
    assert ran.exit_code == 0
    return [json.loads(line) for line in ran.stdout.splitlines()]


def cases(file: str) -> list[dict[str, object]]:
    return json.loads((REFERENCE_DIR / "chat" / file).read_text())["cases"]


def test_encode_gives_the_prompts_of_the_reference():
    keys = ("messages", "thinking_mode", "context", "drop_thinking", "add_default_bos_token")
    chosen = [case for case in cases("chat_encode.json") if case["name"] != "missing_tool_result"]
    lines = [json.dumps({key: case[key] for key in keys if key in case}) for case in chosen]
    for answer, case in zip(ask("encode", *lines), chosen, strict=True):
        assert answer.get("prompt") == case.get("expected")
        assert ("error" in answer) == ("expected_error" in case)


def test_parse_gives_the_replies_of_the_reference():
    chosen = cases("chat_parse.json")
    lines = [json.dumps({key: case[key] for key in ("text", "thinking_mode")}) for case in chosen]
    for answer, case in zip(ask("parse", *lines), chosen, strict=True):
        if "expected" in case:
            assert answer == case["expected"]
        else:
            assert list(answer) == ["error"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "JSON"),
        ("[]", "list"),
        ('{"messages": []}', "thinking_mode"),
        ('{"messages": 5, "thinking_mode": "chat"}', "messages"),
        ('{"mesages": [], "thinking_mode": "chat"}', "mesages"),
    ],
)
def test_refused_line_says_why_and_the_next_is_read(line, named):
    good = '{"messages": [{"role": "user", "content": "é"}], "thinking_mode": "chat"}'
    refused, answered = ask("encode", line, good)
    assert named in str(refused["error"])
    assert "é" in str(answered["prompt"])
