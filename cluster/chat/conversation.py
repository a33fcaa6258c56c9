"""The turns of a chat and what follows from each reply; no I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.front.chat.encoding import encode_messages
from router.front.chat.parsing import Reply


@dataclass(frozen=True)
class Call:
    """A tool that the model wants run."""

    call_id: str
    name: str
    arguments: str
    """The text of a JSON object, as the model wrote it."""


class Conversation:
    """Turns so far; a question and everything up to its answer is kept whole or, on failure, not at all."""

    def __init__(
        self, *, thinking_mode: str, system: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._thinking_mode = thinking_mode
        self._messages: list[Mapping[str, Any]] = []
        if system or tools:
            self._messages.append({"role": "system", "content": system, "tools": [*tools]})
        self._num_kept = len(self._messages)
        self._num_calls = 0

    @property
    def thinking_mode(self) -> str:
        """One of "thinking" and "chat"."""
        return self._thinking_mode

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """Every turn, oldest first."""
        return tuple(self._messages)

    def ask(self, text: str) -> None:
        """A user's turn."""
        self._messages.append({"role": "user", "content": text})

    def prompt(self) -> str:
        """What the model reads next.

        Raises:
            InvalidRequest: a call has no result yet.
        """
        return encode_messages(self._messages, thinking_mode=self._thinking_mode)

    def take(self, reply: Reply) -> list[Call]:
        """A reply of the model: the calls to run before it goes on; none = the question is answered."""
        calls = []
        for call in reply.tool_calls:
            function = call["function"]
            calls.append(Call(f"call_{self._num_calls}", function["name"], function["arguments"]))
            self._num_calls += 1
        turn: dict[str, Any] = {"role": "assistant", "content": reply.content}
        turn["reasoning_content"] = reply.reasoning_content
        turn["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        self._messages.append(turn)
        if not calls:
            self._num_kept = len(self._messages)
        return calls

    def add_result(self, call: Call, text: str) -> None:
        """What a tool said to a call."""
        self._messages.append({"role": "tool", "tool_call_id": call.call_id, "content": text})

    def forget_question(self) -> None:
        """Takes back the question that was not answered, and what followed it."""
        del self._messages[self._num_kept :]
