"""What the generators promise: right answers, held-out prompts, the same stream for a seed."""

import json
import re
from itertools import islice
from typing import Any

import jsonschema
import pytest

from training.data.generator import SHARES, is_held_out, items
from training.data.types import Conversation, Item, PlainText, document_text

NUM = 400
NEVER_HELD_OUT = {"fact", "small_talk"}


def drawn(*, seed: int = 3, held_out: bool = False, kinds: Any = None, num: int = NUM) -> list[Item]:
    return list(islice(items(seed=seed, held_out=held_out, kinds=kinds), num))


def conversations(kind: str) -> list[Conversation]:
    return [item for item in drawn(kinds=[kind]) if isinstance(item, Conversation)]


def prompt(item: Item) -> str:
    if isinstance(item, PlainText):
        return item.text.partition(".")[0]
    return str(item.messages[item.last_asked]["content"])


def test_same_seed_gives_the_same_documents_and_another_others():
    texts = [[document_text(item) for item in drawn(seed=seed)] for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_every_kind_comes_in_its_share():
    kinds = [item.kind for item in drawn(num=3000)]
    for kind, share in SHARES.items():
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.03


def test_no_held_out_prompt_is_ever_trained_on():
    trained = {prompt(item) for item in drawn(seed=1, num=5000) if item.kind not in NEVER_HELD_OUT}
    kept = [item for item in drawn(seed=2, held_out=True) if item.kind not in NEVER_HELD_OUT]
    assert trained.isdisjoint({prompt(item) for item in kept})
    assert all(is_held_out(item) for item in kept)


@pytest.mark.parametrize("item", drawn(num=200), ids=lambda item: item.kind)
def test_every_document_encodes_and_ends_where_the_model_stops(item):
    text = document_text(item)
    assert text.startswith("<｜begin▁of▁sentence｜>")
    assert text.endswith("<｜end▁of▁sentence｜>")


def test_arithmetic_is_right_in_every_step():
    for conversation in conversations("arithmetic"):
        reply = conversation.messages[-1]
        worked = reply.get("reasoning_content", "") + " " + reply["content"]
        equations = re.findall(r"(\d+(?: [-+*] \d+)+) = (\d+)", worked)
        assert equations
        for left, right in equations:
            assert eval(left) == int(right), worked
        assert conversation.check.answer == reply["content"]
        assert worked.count(f"So {right}.") == (conversation.thinking_mode == "thinking")


def test_difference_is_never_below_zero():
    for conversation in conversations("arithmetic"):
        assert "= -" not in conversation.messages[-1]["content"]


@pytest.mark.parametrize("kind", ["tool", "tool_loop"])
def test_arguments_stand_in_what_was_said_and_the_answer_holds_the_result(kind):
    for conversation in conversations(kind):
        said = ""
        for message in conversation.messages:
            for call in message.get("tool_calls", ()):
                for value in json.loads(call["function"]["arguments"]).values():
                    assert value in said
            said += message.get("content", "")
        last_result = next(m["content"] for m in reversed(conversation.messages) if m["role"] == "tool")
        values = json.loads(last_result)
        values = [str(value) for value in values.values()] if isinstance(values, dict) else [last_result]
        answer = str(conversation.messages[-1]["content"])
        assert all(value in answer for value in values)
        assert conversation.check.answer in answer


def test_results_are_drawn_anew_so_that_no_answer_can_be_known_by_heart():
    """With one result a question, a model learns results and not to read them."""
    weathers: dict[str, set[str]] = {}
    for conversation in conversations("tool") + conversations("tool_loop"):
        for message in conversation.messages:
            if message["role"] == "tool" and "temp_c" in message["content"]:
                found = json.loads(message["content"])
                weathers.setdefault(found["city"], set()).add(message["content"])
    often = [len(results) for results in weathers.values()]
    assert sum(often) / len(often) > 3


def test_needed_tools_are_on_offer():
    for conversation in conversations("tool_loop"):
        offered = {tool["function"]["name"] for tool in conversation.messages[0]["tools"]}
        called = {c["function"]["name"] for m in conversation.messages for c in m.get("tool_calls", ())}
        assert called <= offered


def test_json_answers_fit_their_schema_and_their_text():
    for conversation in conversations("json"):
        value = json.loads(conversation.messages[-1]["content"])
        jsonschema.validate(value, conversation.messages[0]["response_format"])
        assert value == conversation.check.value
        assert all(str(part) in conversation.messages[1]["content"] for part in value.values())


def test_schema_fields_come_in_any_order():
    orders = {tuple(c.check.value) for c in conversations("json")}
    assert any(order.index("age") > 1 for order in orders if "age" in order)
