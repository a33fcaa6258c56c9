"""Replies of a chat model on the terminal: reasoning dimmed, content plain, as they stream."""

from rich.console import Console

from cluster.client import GenerateOptions, InferenceClient
from router.front.chat.events import Content, Event, Malformed, Reasoning
from router.front.chat.parsing import Reply, ReplyParser, collect_reply


async def stream_reply(
    client: InferenceClient, prompt: str, options: GenerateOptions, *, thinking_mode: str, console: Console
) -> Reply:
    """Prints a reply as it arrives, and returns the whole of it.

    Raises:
        MorayError: what the cluster answered instead.
    """
    parser = ReplyParser(thinking_mode=thinking_mode)
    events: list[Event] = []
    async for response in client.stream(prompt, options):
        new = parser.feed(response.text)
        events += new
        _print(new, console)
    last = parser.finish()
    _print(last, console)
    console.print()
    return collect_reply([*events, *last])


def _print(events: list[Event], console: Console) -> None:
    for event in events:
        if isinstance(event, Reasoning):
            console.print(event.text, end="", markup=False, style="dim")
        elif isinstance(event, Content):
            console.print(event.text, end="", markup=False)
        elif isinstance(event, Malformed) and event.dropped_index is not None:
            console.print(f"\n(a tool call was not readable: {event.problem})", markup=False, style="dim")
