"""What a reply is made of, in the order in which it streams."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Text between <think> and </think>."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call of a tool begins."""

    index: int
    """Place among the calls of this reply, from 0."""
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """The next piece of a call's arguments; all pieces together are the text of one JSON object.

    A string is escaped here; any other value passes as the model wrote it, valid JSON or not.
    """

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call is whole."""

    index: int


@dataclass(frozen=True)
class Malformed:
    """The reply left the format here; what could not be read follows as content."""

    problem: str
    dropped_index: int | None = None
    """A call that had started and is void."""


Event = Reasoning | Content | CallStarted | ArgumentsDelta | CallEnded | Malformed
