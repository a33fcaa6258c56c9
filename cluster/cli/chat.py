"""`moray chat`: a conversation over gRPC, with tools that are Python functions on this side."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.chat.conversation import Call, Conversation
from cluster.chat.demo_tools import calculator, lookup, weather
from cluster.chat.tools import Tool, load_tools, make_tool, run_call
from cluster.cli.failure import report
from cluster.cli.replies import stream_reply
from cluster.client import GenerateOptions, InferenceClient
from cluster.local_state import router_address
from wire.errors import ConfigError, MorayError

_SYSTEM = "You are Moray, a helpful assistant."
_MAX_TOKENS = 512


@dataclass(frozen=True)
class _Session:
    """What one run of the command holds on to."""

    address: str
    options: GenerateOptions
    tools: Sequence[Tool]
    max_tool_rounds: int
    console: Console


def chat(  # noqa: PLR0913, PLR0917 - one parameter a flag
    text: Annotated[
        str | None, typer.Argument(help="Ask this and leave; else a line of stdin a turn.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Python file whose public functions are the tools.")
    ] = None,
    no_tools: Annotated[bool, typer.Option("--no-tools", help="Offer no tools.")] = False,
    thinking: Annotated[bool, typer.Option(help="Let the model reason first.")] = True,
    system: Annotated[str, typer.Option(help="System text.")] = _SYSTEM,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one reply at most.")] = _MAX_TOKENS,
    max_tool_rounds: Annotated[int, typer.Option(min=0, help="Rounds of calls for one question.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same text.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model; empty = the one served.")] = "",
    address: Annotated[str | None, typer.Option(help="host:port of a router; else MORAY_ADDRESS.")] = None,
) -> None:
    """Talks with the model; it may call tools, demo ones unless told otherwise."""
    offered = _offered(tools, no_tools=no_tools)
    conversation = Conversation(
        thinking_mode="thinking" if thinking else "chat",
        system=system,
        tools=[tool.schema for tool in offered],
    )
    session = _Session(
        address=router_address(address),
        options=GenerateOptions(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed),
        tools=offered,
        max_tool_rounds=max_tool_rounds,
        console=Console(soft_wrap=True, highlight=False),
    )
    if text is not None:
        asyncio.run(_answer(session, conversation, text))
        return
    for line in _lines():
        if line.strip():
            _try_answer(session, conversation, line.rstrip("\n"))


def _offered(tools: Path | None, *, no_tools: bool) -> list[Tool]:
    if tools is not None and no_tools:
        raise ConfigError(field="--tools", wanted="either --tools or --no-tools", given="both")
    if no_tools:
        return []
    if tools is not None:
        return load_tools(tools)
    demo: tuple[Callable[..., object], ...] = (calculator, weather, lookup)
    return [make_tool(function) for function in demo]


def _lines() -> Iterator[str]:
    """The user's turns: asked for on a terminal until Ctrl-D, else the lines of stdin."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("you> ")
        except EOFError:
            sys.stdout.write("\n")
            return


def _try_answer(session: _Session, conversation: Conversation, text: str) -> None:
    """One turn; a failure or Ctrl-C takes it back and the chat goes on."""
    try:
        asyncio.run(_answer(session, conversation, text))
    except KeyboardInterrupt:
        session.console.print("\n(stopped)", style="dim")
        conversation.forget_question()
    except MorayError as error:
        report(error)
        conversation.forget_question()


async def _answer(session: _Session, conversation: Conversation, text: str) -> None:
    """Asks, runs the tools that the model calls, and asks again until it answers."""
    conversation.ask(text)
    async with InferenceClient(session.address) as client:
        for _ in range(session.max_tool_rounds + 1):
            reply = await stream_reply(
                client,
                conversation.prompt(),
                session.options,
                thinking_mode=conversation.thinking_mode,
                console=session.console,
            )
            calls = conversation.take(reply)
            if not calls:
                return
            for call in calls:
                conversation.add_result(call, _run(session, call))
    conversation.forget_question()
    session.console.print(f"(gave up after {session.max_tool_rounds} rounds of tool calls)", style="dim")


def _run(session: _Session, call: Call) -> str:
    session.console.print(f"→ {call.name} {call.arguments}", markup=False, style="cyan")
    result = run_call(session.tools, call.name, call.arguments)
    session.console.print(f"← {result}", markup=False, style="cyan")
    return result
