"""`moray generate`: a gRPC client that streams an answer, or answers many prompts at once."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.chat.conversation import Conversation
from cluster.cli.replies import stream_reply
from cluster.client import GenerateOptions, InferenceClient
from cluster.local_state import router_address
from wire.errors import ConfigError

_UINT32 = 2**32 - 1
"""What the wire can carry; the router checks whether it makes sense."""


def generate(  # noqa: PLR0913, PLR0917 - one parameter a flag
    text: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    tokens: Annotated[Path | None, typer.Option(help='File with {"tokens": [[id, ...], ...]}.')] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=_UINT32, help="New tokens at most.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, (0, 1].")] = None,
    top_k: Annotated[int, typer.Option(min=0, max=_UINT32, help="0 = all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same text.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model; empty = the one served.")] = "",
    address: Annotated[str | None, typer.Option(help="host:port of a router; else MORAY_ADDRESS.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the chat format.")] = False,
    thinking: Annotated[bool, typer.Option(help="With --chat: let the model reason first.")] = True,
    system: Annotated[str, typer.Option(help="With --chat: system text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help='Print {"outputs": [[id, ...], ...]}.')] = False,
) -> None:
    """Sends a prompt and streams the answer."""
    options = GenerateOptions(
        model=model,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        deadline_s=deadline_s,
    )
    target = router_address(address)
    if (text is None) == (tokens is None):
        raise ConfigError(field="text", wanted="either a text or --tokens", given="both" if text else "none")
    if chat and text is None:
        raise ConfigError(field="--chat", wanted="a text to put into the chat format", given="--tokens")
    conversation = Conversation(thinking_mode="thinking" if thinking else "chat", system=system)
    if chat:
        conversation.ask(text or "")
    if tokens is None and not as_json:
        answer = (
            print_reply(target, conversation, options) if chat else print_answer(target, text or "", options)
        )
        asyncio.run(answer)
        return
    prompts = read_prompts(tokens) if tokens is not None else [conversation.prompt() if chat else text or ""]
    outputs = asyncio.run(_collect(target, prompts, options))
    if as_json:
        typer.echo(json.dumps({"outputs": outputs}))
    else:
        for output in outputs:
            typer.echo(" ".join(map(str, output)))


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a token file.

    Raises:
        ConfigError: it cannot be read, or is not {"tokens": [[id, ...], ...]}.
    """
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            field="--tokens", wanted="a readable JSON file", given=f"{path}: {error}"
        ) from error
    prompts = raw.get("tokens") if isinstance(raw, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(_is_prompt(prompt) for prompt in prompts):
        wanted = '{"tokens": [[id, ...], ...]} with ids in [0, 2^32)'
        raise ConfigError(field="--tokens", wanted=wanted, given=str(raw)[:80])
    return prompts


def _is_prompt(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**32 for i in prompt)


async def _collect(target: str, prompts: list[Any], options: GenerateOptions) -> list[list[int]]:
    async with InferenceClient(target) as client:
        return await client.all_tokens(prompts, options)


async def print_reply(target: str, conversation: Conversation, options: GenerateOptions) -> None:
    """Prints the reply to a conversation as it arrives."""
    console = Console(soft_wrap=True, highlight=False)
    async with InferenceClient(target) as client:
        mode = conversation.thinking_mode
        await stream_reply(client, conversation.prompt(), options, thinking_mode=mode, console=console)


async def print_answer(target: str, text: str, options: GenerateOptions) -> None:
    """Prints an answer as it arrives; token ids where the model has no tokenizer."""
    console = Console(soft_wrap=True, highlight=False)
    async with InferenceClient(target) as client:
        has_text = False
        token_ids: list[int] = []
        async for response in client.stream(text, options):
            has_text = has_text or bool(response.text)
            token_ids.extend(response.token_ids)
            console.print(response.text, end="", markup=False)
        console.print("" if has_text else " ".join(map(str, token_ids)), markup=False)
