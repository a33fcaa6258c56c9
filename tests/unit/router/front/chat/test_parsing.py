"""Replies into events: the handed-over cases, any cut of the stream, nothing lost, and back again."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.front.chat import markup
from router.front.chat.encoding import encode_messages
from router.front.chat.events import ArgumentsDelta, Content, Event, Malformed, Reasoning
from router.front.chat.parsing import ReplyParser, collect_reply, parse_reply
from tests.reference_data import REFERENCE_DIR
from wire.errors import InvalidRequest

CASES = json.loads((REFERENCE_DIR / "chat" / "chat_parse.json").read_text())["cases"]
PIECES = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            markup.EOS,
            "\n\n",
            "\n",
            "<",
            "｜DSML｜",
            "text",
            " ",
            '"',
            '">\n',
            "é🌍",
            "{}",
        ),
        *(markup.CALLS_OPEN, markup.CALLS_CLOSE, '<｜DSML｜invoke name="f">\n', markup.INVOKE_CLOSE),
        *('<｜DSML｜parameter name="p" string="true">', '<｜DSML｜parameter name="q" string="false">'),
        markup.PARAMETER_CLOSE,
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n',
    ]
)
MODES = st.sampled_from(["thinking", "chat"])


def parse_in(pieces: list[str], mode: str) -> list[Event]:
    parser = ReplyParser(thinking_mode=mode)
    return joined([event for piece in [*pieces] for event in parser.feed(piece)] + parser.finish())


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one text put together."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        same_text = type(last) is type(event) and isinstance(event, (Reasoning, Content))
        same_call = isinstance(last, ArgumentsDelta) and isinstance(event, ArgumentsDelta)
        if (same_text or (same_call and last.index == event.index)) and last is not None:
            out[-1] = replace(last, text=last.text + event.text)
        else:
            out.append(event)
    return out


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize("case", [c for c in CASES if "expected" in c], ids=lambda case: case["name"])
def test_reply_equals_the_reference(case):
    reply = parse_reply(case["text"], thinking_mode=case["thinking_mode"])
    assert reply.problem is None
    assert reply.content == case["expected"]["content"]
    assert reply.reasoning_content == case["expected"]["reasoning_content"]
    assert list(reply.tool_calls) == case["expected"]["tool_calls"]


@pytest.mark.parametrize("case", [c for c in CASES if "expected" not in c], ids=lambda case: case["name"])
def test_what_the_reference_refuses_is_flagged(case):
    assert parse_reply(case["text"], thinking_mode=case["thinking_mode"]).problem


@given(case=st.sampled_from(CASES), places=st.lists(st.integers(0, 2000), max_size=30))
def test_cuts_change_no_event_of_the_cases(case, places):
    whole = parse_in([case["text"]], case["thinking_mode"])
    assert parse_in(cut(case["text"], places), case["thinking_mode"]) == whole


@given(pieces=st.lists(PIECES, max_size=25), places=st.lists(st.integers(0, 2000), max_size=40), mode=MODES)
def test_cuts_change_no_event_of_any_markup(pieces, places, mode):
    text = "".join(pieces)
    assert parse_in(cut(text, places), mode) == parse_in([text], mode) == parse_in(list(text), mode)


@given(pieces=st.lists(PIECES, max_size=25), mode=MODES)
def test_malformed_call_loses_no_text(pieces, mode):
    """What is neither markup that was understood nor arguments is in the reply, in order."""
    text = "".join(pieces)
    reply = collect_reply(parse_in([text], mode))
    if not reply.tool_calls:
        left = reply.reasoning_content + reply.content
        for part in ("</think>", markup.EOS):
            text, left = text.replace(part, ""), left.replace(part, "")
        assert left.replace("\n\n", "") == text.replace("\n\n", "")


def test_void_call_is_named_and_its_text_comes_back():
    text = f'a\n\n{markup.CALLS_OPEN}\n{markup.INVOKE_OPEN}f">\n{markup.PARAMETER_OPEN}p" string="true">x'
    events = parse_in([text], "chat")
    assert Malformed("the tool block was not finished", dropped_index=0) in events
    assert collect_reply(events).content == text
    assert collect_reply(events).tool_calls == ()


def test_argument_text_streams_before_the_call_is_whole():
    parser = ReplyParser(thinking_mode="chat")
    head = f'\n\n{markup.CALLS_OPEN}\n{markup.INVOKE_OPEN}f">\n{markup.PARAMETER_OPEN}p" string="true">'
    parser.feed(head)
    assert parser.feed('say "hi"') == [ArgumentsDelta(0, 'say \\"hi\\"')]


def test_text_is_held_back_only_while_it_may_be_markup():
    parser = ReplyParser(thinking_mode="thinking")
    assert parser.feed("so</thi") == [Reasoning("so")]
    assert parser.feed("s is it") == [Reasoning("</this is it")]


def test_calls_may_come_before_the_reasoning_is_closed():
    text = f'r\n\n{markup.CALLS_OPEN}\n{markup.INVOKE_OPEN}f">\n\n{markup.INVOKE_CLOSE}\n{markup.CALLS_CLOSE}'
    reply = parse_reply(text, thinking_mode="thinking")
    assert (reply.reasoning_content, len(reply.tool_calls)) == ("r", 1)


def test_unknown_mode_is_refused():
    with pytest.raises(InvalidRequest, match="thinking_mode"):
        ReplyParser(thinking_mode="fast")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<｜"), max_size=12)
NAMES = st.text("abcdefg_é", min_size=1, max_size=6)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON | WORDS, max_size=3)), max_size=3)


@given(reasoning=WORDS, content=WORDS, calls=CALLS, mode=MODES)
def test_encode_parse_encode_is_the_identity(reasoning, content, calls, mode):
    asked = [{"role": "user", "content": "?"}]
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if mode == "thinking":
        turn["reasoning_content"] = reasoning or "r"
    turn["tool_calls"] = [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    prompt, whole = (encode_messages(messages, thinking_mode=mode) for messages in (asked, [*asked, turn]))
    reply = parse_reply(whole.removeprefix(prompt), thinking_mode=mode)
    assert reply.problem is None
    again = {
        "role": "assistant",
        "content": reply.content,
        "reasoning_content": reply.reasoning_content,
        "tool_calls": list(reply.tool_calls),
    }
    assert encode_messages([*asked, again], thinking_mode=mode) == whole
