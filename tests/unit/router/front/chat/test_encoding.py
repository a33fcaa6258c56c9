"""Messages into prompts: the handed-over cases, the order of tool results, refusals that name the field."""

import json
from typing import Any

import pytest

from router.front.chat.encoding import encode_messages
from tests.reference_data import REFERENCE_DIR
from wire.errors import InvalidRequest

CASES = json.loads((REFERENCE_DIR / "chat" / "chat_encode.json").read_text())["cases"]
REFUSED_HERE = "missing_tool_result"
"""The public encoder leaves the block of results open: a prompt unlike any the model was trained on."""
OPTIONS = ("context", "drop_thinking", "add_default_bos_token")


def encode(case: dict[str, Any]) -> str:
    options = {key: case[key] for key in OPTIONS if key in case}
    return encode_messages(case["messages"], thinking_mode=case["thinking_mode"], **options)


def good(case: dict[str, Any]) -> bool:
    return "expected" in case and case["name"] != REFUSED_HERE


@pytest.mark.parametrize("case", [case for case in CASES if good(case)], ids=lambda case: case["name"])
def test_prompt_equals_the_reference(case):
    assert encode(case) == case["expected"]


@pytest.mark.parametrize("case", [case for case in CASES if not good(case)], ids=lambda case: case["name"])
def test_what_the_reference_refuses_is_refused(case):
    with pytest.raises(InvalidRequest) as refused:
        encode(case)
    assert refused.value.field


def call(call_id: str, query: str) -> dict[str, Any]:
    arguments = json.dumps({"q": query})
    return {"id": call_id, "type": "function", "function": {"name": "search", "arguments": arguments}}


def tool_round(*results: dict[str, Any]) -> list[dict[str, Any]]:
    calls = [call("a", "first"), call("b", "second")]
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning_content": "r", "tool_calls": calls},
    ]
    return turns + [{"role": "tool", **result} for result in results]


def test_results_are_put_in_the_order_of_their_calls():
    first, second = {"tool_call_id": "a", "content": "1"}, {"tool_call_id": "b", "content": "2"}
    in_order = encode_messages(tool_round(first, second), thinking_mode="thinking")
    assert encode_messages(tool_round(second, first), thinking_mode="thinking") == in_order
    assert "<result>1</result>\n<result>2</result>" in in_order


@pytest.mark.parametrize(
    ("messages", "field", "named"),
    [
        (tool_round({"tool_call_id": "b", "content": "2"}), "messages", "'a'"),
        (tool_round({"tool_call_id": "c", "content": "3"}), "messages[2].tool_call_id", "'c'"),
        (tool_round(*[{"content": "x"}] * 3), "messages[4]", "2 results"),
        ([{"role": "user", "content": 5}], "messages[0].content", "int"),
        (["hello"], "messages[0].role", "str"),
        ([{"role": "system", "content": "", "tools": "calculator"}], "messages[0].tools", "list"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls", "list"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name", "name"),
    ],
)
def test_refusal_names_the_field_and_what_is_wrong(messages, field, named):
    with pytest.raises(InvalidRequest) as refused:
        encode_messages(messages, thinking_mode="thinking")
    assert refused.value.field == field
    assert named in refused.value.message


@pytest.mark.parametrize("arguments", ["[1]", "{", 5])
def test_arguments_that_are_no_object_are_refused(arguments):
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(InvalidRequest, match="JSON object"):
        encode_messages([{"role": "user", "content": "?"}, turn], thinking_mode="chat")


def test_reasoning_stays_in_the_tool_loop_and_is_dropped_after_the_next_question():
    turns = tool_round({"content": "1"}, {"content": "2"})
    assert "<think>r</think>" in encode_messages(turns, thinking_mode="thinking")
    later = [*turns, {"role": "assistant", "content": "done", "reasoning_content": "s"}]
    later.append({"role": "user", "content": "and?"})
    assert "r</think>" not in encode_messages(later, thinking_mode="thinking")
