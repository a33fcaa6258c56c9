"""Reply text into events, whatever way the stream is cut.

Text is held back only while it may still turn out to be markup. Nothing raises and no text is lost: a tool
block that leaves the format becomes content from its first unread call on, behind a `Malformed`.

Source: the format of DeepSeek's encoding_dsv32.py; tests/data/reference/chat has the cases.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.front.chat import markup
from router.front.chat.encoding import check_thinking_mode
from router.front.chat.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    Event,
    Malformed,
    Reasoning,
)

_STRAY = (markup.THINK_OPEN, markup.THINK_CLOSE, "｜DSML｜")
"""Markup that has no place in content."""
_MAX_NAME_CHARS = 256
_BEFORE_CALLS = "\n\n"
_IS_TEXT: Mapping[str, bool] = {'" string="true">': True, '" string="false">': False}


class _LeftFormat(Exception):
    """The text cannot be part of a tool block."""


class _NeedMore(Exception):
    """The buffer ends before this can be decided."""


class ReplyParser:
    """Takes one reply piece by piece.

    Raises:
        InvalidRequest: the thinking mode is neither "thinking" (the prompt ended with <think>) nor "chat".
    """

    def __init__(self, *, thinking_mode: str) -> None:
        check_thinking_mode(thinking_mode)
        thinks = thinking_mode == "thinking"
        self._state: Callable[[], None] = self._reasoning if thinks else self._content
        self._buffer = ""
        self._read = ""
        """Tool block text since the last whole call: content if the block turns out malformed."""
        self._events: list[Event] = []
        self._num_calls = 0
        self._is_open = False
        """A call has started and not ended."""
        self._parameters: list[str] = []
        self._value_is_text = False

    def feed(self, text: str) -> list[Event]:
        """The events that these characters complete."""
        self._buffer += text
        self._advance()
        return self._taken()

    def finish(self) -> list[Event]:
        """The events of what was held back, at the end of the stream; an end mark is not needed."""
        self._advance()
        held, self._buffer = self._buffer, ""
        if self._state == self._reasoning:
            self._say(Reasoning, held)
            self._events.append(Malformed("the reasoning was not closed with </think>"))
        elif self._state in {self._content, self._rest, self._after_end, self._all_content}:
            self._say(Content, held)
        elif self._state == self._after_calls:
            self._trail(held)
        else:
            self._buffer = held
            self._spill("the tool block was not finished")
            self._say(Content, self._buffer)
            self._buffer = ""
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _advance(self) -> None:
        """Runs states until one needs more text."""
        while self._buffer:
            try:
                self._state()
            except _NeedMore:
                return
            except _LeftFormat as error:
                self._spill(str(error))

    def _say(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if text:
            self._events.append(kind(text))

    # Text: up to the next markup.

    def _reasoning(self) -> None:
        marker = self._pass_text(Reasoning, (markup.THINK_CLOSE, markup.CALLS_OPEN, markup.EOS))
        if marker == markup.THINK_CLOSE:
            self._state = self._content
            return
        self._events.append(Malformed(f"{marker} came before </think>"))
        self._state = self._block_start if marker == markup.CALLS_OPEN else self._after_end

    def _content(self) -> None:
        marker = self._pass_text(Content, (markup.CALLS_OPEN, markup.EOS, *_STRAY))
        if marker == markup.CALLS_OPEN:
            self._state = self._block_start
        elif marker == markup.EOS:
            self._state = self._after_end
        else:
            self._events.append(Malformed(f"{marker} in the content"))
            self._say(Content, marker)

    def _rest(self) -> None:
        """Everything is content, up to the end mark."""
        self._pass_text(Content, (markup.EOS,))
        self._state = self._after_end

    def _after_end(self) -> None:
        self._events.append(Malformed("text after the end mark"))
        self._say(Content, self._buffer)
        self._buffer, self._state = "", self._all_content

    def _all_content(self) -> None:
        self._say(Content, self._buffer)
        self._buffer = ""

    def _pass_text(self, kind: type[Reasoning] | type[Content], markers: Sequence[str]) -> str:
        """Emits text up to the next marker and takes it, with the line breaks that belong to a tool block."""
        places = [(place, marker) for marker in markers if (place := self._buffer.find(marker)) >= 0]
        place, marker = min(places, default=(len(self._buffer), ""))
        held = _held_from(self._buffer, markers)
        if held < place or not marker:
            text, self._buffer = self._buffer[:held], self._buffer[held:]
            self._say(kind, text)
            raise _NeedMore
        text, self._buffer = self._buffer[:place], self._buffer[place + len(marker) :]
        if marker == markup.CALLS_OPEN:
            is_apart = text.endswith(_BEFORE_CALLS)
            self._say(kind, text.removesuffix(_BEFORE_CALLS) if is_apart else text)
            if not is_apart:
                self._events.append(Malformed("a tool block without an empty line before it"))
            self._read = (_BEFORE_CALLS if is_apart else "") + marker
        else:
            self._say(kind, text)
        return marker

    # A tool block: each state takes one piece of it.

    def _block_start(self) -> None:
        self._take("\n")
        self._state = self._first_call

    def _first_call(self) -> None:
        self._take(markup.INVOKE_OPEN)
        self._state = self._call_name

    def _next_call(self) -> None:
        if self._take(markup.INVOKE_OPEN, markup.CALLS_CLOSE) == markup.INVOKE_OPEN:
            self._state = self._call_name
        else:
            self._read = ""
            self._state = self._after_calls

    def _call_name(self) -> None:
        name = self._take_name(('">\n',))[0]
        self._events.append(CallStarted(self._num_calls, name))
        self._is_open, self._parameters = True, []
        self._delta("{")
        self._state = self._first_parameter

    def _first_parameter(self) -> None:
        if self._take("\n" + markup.INVOKE_CLOSE, markup.PARAMETER_OPEN) == markup.PARAMETER_OPEN:
            self._state = self._parameter_name
        else:
            self._state = self._call_end

    def _parameter_name(self) -> None:
        name, kind = self._take_name(tuple(_IS_TEXT))
        if name in self._parameters:
            raise _LeftFormat(f"parameter {name!r} came twice")
        self._value_is_text = _IS_TEXT[kind]
        separator = ", " if self._parameters else ""
        self._parameters.append(name)
        self._delta(f"{separator}{_quoted(name)}: " + ('"' if self._value_is_text else ""))
        self._state = self._value

    def _value(self) -> None:
        place = self._buffer.find(markup.PARAMETER_CLOSE)
        end = place if place >= 0 else _held_from(self._buffer, (markup.PARAMETER_CLOSE,))
        value, self._buffer = self._buffer[:end], self._buffer[end:]
        self._read += value
        if value:
            self._delta(_quoted(value)[1:-1] if self._value_is_text else value)
        if place < 0:
            raise _NeedMore
        self._take(markup.PARAMETER_CLOSE)
        if self._value_is_text:
            self._delta('"')
        self._state = self._after_value

    def _after_value(self) -> None:
        self._take("\n")
        self._state = self._next_parameter

    def _next_parameter(self) -> None:
        if self._take(markup.PARAMETER_OPEN, markup.INVOKE_CLOSE) == markup.PARAMETER_OPEN:
            self._state = self._parameter_name
        else:
            self._state = self._call_end

    def _call_end(self) -> None:
        self._take("\n")
        self._delta("}")
        self._events.append(CallEnded(self._num_calls))
        self._num_calls += 1
        self._is_open, self._read = False, ""
        self._state = self._next_call

    def _after_calls(self) -> None:
        if self._buffer.startswith(markup.EOS):
            self._buffer = self._buffer[len(markup.EOS) :]
            self._state = self._after_end
        elif markup.EOS.startswith(self._buffer):
            raise _NeedMore
        else:
            self._trail("")

    def _trail(self, text: str) -> None:
        """What follows a whole tool block is content, and should not be there."""
        if text or self._buffer:
            self._events.append(Malformed("text after the tool block"))
            self._say(Content, text)
        self._state = self._rest

    def _take(self, *options: str) -> str:
        """Takes the option that the buffer begins with; all differ in their beginnings."""
        for option in options:
            if self._buffer.startswith(option):
                self._buffer = self._buffer[len(option) :]
                self._read += option
                return option
        if any(option.startswith(self._buffer) for option in options):
            raise _NeedMore
        wanted = " or ".join(map(repr, options))
        raise _LeftFormat(f"wanted {wanted} in a tool block")

    def _take_name(self, endings: Sequence[str]) -> tuple[str, str]:
        """Takes a name and what stands behind it: (name, ending); a name has no quote and no line break."""
        end = next((i for i, char in enumerate(self._buffer) if char in '"\n'), len(self._buffer))
        if end > _MAX_NAME_CHARS:
            raise _LeftFormat(f"a name of more than {_MAX_NAME_CHARS} characters")
        if end == len(self._buffer):
            raise _NeedMore
        name, behind = self._buffer[:end], self._buffer[end:]
        ending = next((ending for ending in endings if behind.startswith(ending)), None)
        if name and ending is not None:
            self._buffer = behind[len(ending) :]
            self._read += name + ending
            return name, ending
        if name and any(ending.startswith(behind) for ending in endings):
            raise _NeedMore
        raise _LeftFormat(f"wanted a name and {' or '.join(map(repr, endings))} in a tool block")

    def _delta(self, text: str) -> None:
        self._events.append(ArgumentsDelta(self._num_calls, text))

    def _spill(self, problem: str) -> None:
        """The block is not one: what was read of it since the last whole call is content after all."""
        self._events.append(Malformed(problem, self._num_calls if self._is_open else None))
        self._is_open = False
        self._say(Content, self._read)
        self._read = ""
        self._state = self._rest


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _held_from(text: str, markers: Sequence[str]) -> int:
    """Where the end of text begins that may be the start of a marker; len(text) if none may.

    "a <thi" and "<think>": 2.
    """
    longest = max(map(len, markers)) + len(_BEFORE_CALLS)
    wanted = [*markers]
    if markup.CALLS_OPEN in markers:
        wanted.append(_BEFORE_CALLS + markup.CALLS_OPEN)
    for place in range(max(0, len(text) - longest + 1), len(text)):
        end = text[place:]
        if any(len(end) < len(marker) and marker.startswith(end) for marker in wanted):
            return place
    return len(text)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply."""

    content: str
    reasoning_content: str
    tool_calls: tuple[Mapping[str, Any], ...]
    """[{"type": "function", "function": {"name", "arguments"}}], as the OpenAI API writes them."""
    problem: str | None
    """Where it left the format first; None = nowhere."""


def collect_reply(events: Sequence[Event]) -> Reply:
    """The reply that these events, all of a stream, make up; void calls are left out."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallStarted):
            names[event.index], arguments[event.index] = event.name, ""
        elif isinstance(event, ArgumentsDelta):
            arguments[event.index] += event.text
        elif isinstance(event, Malformed) and event.dropped_index is not None:
            del names[event.dropped_index]
    return Reply(
        content="".join(event.text for event in events if isinstance(event, Content)),
        reasoning_content="".join(event.text for event in events if isinstance(event, Reasoning)),
        tool_calls=tuple(
            {"type": "function", "function": {"name": name, "arguments": arguments[index]}}
            for index, name in names.items()
        ),
        problem=next((event.problem for event in events if isinstance(event, Malformed)), None),
    )


def parse_reply(text: str, *, thinking_mode: str) -> Reply:
    """A whole reply at once.

    Raises:
        InvalidRequest: the thinking mode is neither "thinking" nor "chat".
    """
    parser = ReplyParser(thinking_mode=thinking_mode)
    return collect_reply([*parser.feed(text), *parser.finish()])
