"""`moray generate`: a gRPC client that streams an answer, or answers many prompts at once."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.chat.conversation import Conversation
from cluster.cli.replies import stream_reply
from cluster.cli.sampling_flags import with_options
from cluster.client import Answer, GenerateOptions, InferenceClient
from cluster.local_state import router_address
from wire.errors import ConfigError
from wire.proto import common_pb2


@with_options
def generate(  # noqa: PLR0913, PLR0917 - one parameter a flag
    text: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    tokens: Annotated[Path | None, typer.Option(help='File with {"tokens": [[id, ...], ...]}.')] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a router; else MORAY_ADDRESS.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the chat format.")] = False,
    thinking: Annotated[bool, typer.Option(help="With --chat: let the model reason first.")] = True,
    system: Annotated[str, typer.Option(help="With --chat: system text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help='Print {"outputs": [[id, ...], ...]}.')] = False,
    *,
    options: GenerateOptions,
) -> None:
    """Sends a prompt and streams the answer."""
    target = router_address(address)
    if (text is None) == (tokens is None):
        raise ConfigError(field="text", wanted="either a text or --tokens", given="both" if text else "none")
    if chat and text is None:
        raise ConfigError(field="--chat", wanted="a text to put into the chat format", given="--tokens")
    if chat and options.n != 1:
        raise ConfigError(field="--n", wanted="1 with --chat", given=str(options.n))
    conversation = Conversation(thinking_mode="thinking" if thinking else "chat", system=system)
    if chat:
        conversation.ask(text or "")
    if tokens is None and not as_json:
        printed = (
            print_reply(target, conversation, options) if chat else print_answer(target, text or "", options)
        )
        asyncio.run(printed)
        return
    prompts = read_prompts(tokens) if tokens is not None else [conversation.prompt() if chat else text or ""]
    answers = asyncio.run(_collect(target, prompts, options))
    if as_json:
        typer.echo(json.dumps(describe_answers(answers, options)))
    else:
        for answer in answers:
            typer.echo(" ".join(map(str, answer.token_ids)))


def describe_answers(answers: list[Answer], options: GenerateOptions) -> dict[str, Any]:
    """What --json prints: one entry a prompt, log-probabilities where asked for."""
    described: dict[str, Any] = {"outputs": [answer.token_ids for answer in answers]}
    if options.logprobs is not None:
        described["logprobs"] = [_describe_logprobs(answer.logprobs) for answer in answers]
    if options.prompt_logprobs is not None:
        described["prompt_logprobs"] = [
            [None, *_describe_logprobs(answer.prompt_logprobs[1:])] for answer in answers
        ]
    return described


def _describe_logprobs(logprobs: list[common_pb2.TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            "logprob": one.logprob,
            "top": [list(pair) for pair in zip(one.top_token_ids, one.top_logprobs, strict=True)],
        }
        for one in logprobs
    ]


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


async def _collect(target: str, prompts: list[Any], options: GenerateOptions) -> list[Answer]:
    async with InferenceClient(target) as client:
        return await client.answers(prompts, options)


async def print_reply(target: str, conversation: Conversation, options: GenerateOptions) -> None:
    """Prints the reply to a conversation as it arrives."""
    console = Console(soft_wrap=True, highlight=False)
    async with InferenceClient(target) as client:
        mode = conversation.thinking_mode
        await stream_reply(client, conversation.prompt(), options, thinking_mode=mode, console=console)


async def print_answer(target: str, text: str, options: GenerateOptions) -> None:
    """Prints an answer as it arrives, several outputs once they are whole; ids where no text is."""
    console = Console(soft_wrap=True, highlight=False)
    async with InferenceClient(target) as client:
        if options.n != 1:
            for answer in await client.answer(text, options):
                console.print(answer.text or " ".join(map(str, answer.token_ids)), markup=False)
            return
        answer = Answer()
        async for response in client.stream(text, options):
            answer.add(response)
            console.print(response.text, end="", markup=False)
        console.print("" if answer.text else " ".join(map(str, answer.token_ids)), markup=False)
