"""Scores of a model on conversations that it was not trained on: it writes, tools answer, a check decides."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jsonschema

from router.front.chat.encoding import encode_messages
from router.front.chat.parsing import Reply, parse_reply
from training.data.generator import items
from training.data.types import Conversation, Kind

Answer = Callable[[Sequence[str]], Sequence[str]]
"""Prompts -> what the model writes after each, up to its end mark."""

SCORED: tuple[Kind, ...] = ("arithmetic", "tool", "tool_loop", "json")
_MAX_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one conversation went."""

    conversation: Conversation
    is_right: bool
    wrong: str
    """What went wrong first; "" if nothing did."""
    turns: tuple[tuple[str, str], ...]
    """Each prompt, and what the model wrote after it."""


@dataclass
class _Run:
    """One conversation under way; written by `score` alone."""

    conversation: Conversation
    messages: list[Mapping[str, Any]]
    expected: list[Mapping[str, Any]]
    """The turns still to come, the model's and the tools'."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    wrong: str | None = None

    @property
    def prompt(self) -> str:
        return encode_messages(self.messages, thinking_mode=self.conversation.thinking_mode)


def held_out(kind: Kind, num: int, *, seed: int) -> list[Conversation]:
    """Conversations of one kind whose prompts training never saw."""
    stream = (i for i in items(seed=seed, held_out=True, kinds=[kind]) if isinstance(i, Conversation))
    return list(islice(stream, num))


def score(conversations: Sequence[Conversation], answer: Answer) -> list[Score]:
    """Plays all conversations at once, a round of replies at a time.

    A call is right when tools and arguments are exactly those asked for; then the tool's result goes back.
    The last content is right when it passes the conversation's check.
    """
    runs = [_start(conversation) for conversation in conversations]
    for _ in range(_MAX_ROUNDS):
        waiting = [run for run in runs if run.wrong is None]
        if not waiting:
            break
        prompts = [run.prompt for run in waiting]
        for run, prompt, text in zip(waiting, prompts, answer(prompts), strict=True):
            run.turns.append((prompt, text))
            _take(run, parse_reply(text, thinking_mode=run.conversation.thinking_mode))
    return [
        Score(
            conversation=run.conversation,
            is_right=run.wrong == "",
            wrong="no answer after the last round" if run.wrong is None else run.wrong,
            turns=tuple(run.turns),
        )
        for run in runs
    ]


def _start(conversation: Conversation) -> _Run:
    num_asked = conversation.last_asked + 1
    messages = list(conversation.messages)
    return _Run(conversation, messages[:num_asked], messages[num_asked:])


def _take(run: _Run, reply: Reply) -> None:
    """Takes one reply; sets `wrong` when the conversation is over, to "" if all of it was right."""
    turn = run.expected.pop(0)
    wanted = [_call(call) for call in turn.get("tool_calls", ())]
    try:
        called = [_call(call) for call in reply.tool_calls]
    except ValueError as error:
        run.wrong = f"arguments are not JSON: {error}"
        return
    if called != wanted:
        run.wrong = f"called {called}, wanted {wanted}"
    elif wanted:
        written = {
            "role": "assistant",
            "content": reply.content,
            "reasoning_content": reply.reasoning_content,
        }
        run.messages.append({**written, "tool_calls": turn["tool_calls"]})
        while run.expected[0]["role"] == "tool":
            run.messages.append(run.expected.pop(0))
    else:
        run.wrong = _wrong_content(run.conversation, reply.content)


def _call(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call["function"]
    return function["name"], json.loads(function["arguments"])


def _wrong_content(conversation: Conversation, content: str) -> str:
    check = conversation.check
    if check.answer is not None and check.answer not in content:
        return f"wrote {content!r}, wanted {check.answer!r}"
    if check.schema is not None:
        try:
            jsonschema.validate(json.loads(content), check.schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"wrote {content!r}: {error}"
    return ""
