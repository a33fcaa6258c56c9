"""What the generators make."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from router.front.chat.encoding import encode_messages
from router.front.chat.markup import BOS, EOS

Kind = Literal["arithmetic", "tool", "tool_loop", "json", "story", "fact", "small_talk"]
ThinkingMode = Literal["thinking", "chat"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """How an answer to a conversation is judged."""

    answer: str | None = None
    """The last content must contain it."""
    schema: Mapping[str, Any] | None = None
    """The last content must be JSON that validates."""
    value: Any = None
    """With a schema: the object that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns in the OpenAI API's form, the model's own among them."""

    kind: Kind
    thinking_mode: ThinkingMode
    messages: tuple[Mapping[str, Any], ...]
    check: Check = field(default_factory=Check)

    @property
    def last_asked(self) -> int:
        """Index of the last user turn."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "user")


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text without turns."""

    kind: Kind
    text: str


Item = Conversation | PlainText


def document_text(item: Item) -> str:
    """The item as the model reads it, from the sentence mark to the end mark."""
    if isinstance(item, PlainText):
        return BOS + item.text + EOS
    return encode_messages(item.messages, thinking_mode=item.thinking_mode)
