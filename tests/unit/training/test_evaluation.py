"""Scoring: a model that says what it should is right, each way of going wrong is wrong."""

import re
from collections.abc import Callable, Sequence

import pytest

from router.front.chat.encoding import encode_messages
from training.data.types import Conversation
from training.evaluation import SCORED, Answer, held_out, score

CASES = {kind: held_out(kind, 20, seed=7) for kind in SCORED}


def oracle(conversations: Sequence[Conversation], change: Callable[[str], str] = lambda text: text) -> Answer:
    """Says the generator's own replies, changed."""
    said: dict[str, str] = {}
    for conversation in conversations:
        for idx in range(conversation.last_asked + 1, len(conversation.messages)):
            if conversation.messages[idx]["role"] == "assistant":
                prompt, whole = (
                    encode_messages(conversation.messages[:end], thinking_mode=conversation.thinking_mode)
                    for end in (idx, idx + 1)
                )
                said[prompt] = whole.removeprefix(prompt)
    return lambda prompts: [change(said[prompt]) for prompt in prompts]


@pytest.mark.parametrize("kind", SCORED)
def test_generators_own_replies_are_right(kind):
    scores = score(CASES[kind], oracle(CASES[kind]))
    assert [s.wrong for s in scores] == [""] * len(scores)
    assert all(s.is_right for s in scores)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("arithmetic", lambda text: re.sub(r"= (\d+)\.<", r"= 1\1.<", text)),
        ("tool", lambda text: text.replace('string="true">', 'string="true">x')),
        ("tool", lambda text: text.replace("｜DSML｜invoke", "｜DSML｜invok")),
        ("tool", lambda text: re.sub(r"</think>[^<\n]+<｜end", "</think>I do not know.<｜end", text)),
        ("tool_loop", lambda text: re.sub(r'invoke name="\w+"', 'invoke name="search"', text)),
        ("json", lambda text: text.replace('"name"', '"nome"')),
        ("json", lambda text: text.replace("}", "")),
    ],
)
def test_wrong_replies_are_wrong(kind, change):
    thinking = [c for c in CASES[kind] if kind == "json" or c.thinking_mode == "thinking"]
    assert not any(s.is_right for s in score(thinking, oracle(thinking, change)))


def test_held_out_conversations_are_those_of_the_seed():
    assert held_out("tool", 5, seed=7) == CASES["tool"][:5]
