"""The flags that say how to generate, for commands that take them all."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cluster.client import GenerateOptions
from wire.errors import ConfigError

_UINT32 = 2**32 - 1
"""What the wire can carry; the router checks whether it makes sense."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every flag of `read_options` in place of its parameter `options`."""
    flags = inspect.signature(read_options).parameters
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "options"]

    @functools.wraps(command)
    def run(**given: object) -> None:
        options = read_options(**{name: given.pop(name) for name in flags})  # type: ignore[arg-type]  # typer has checked them
        command(**given, options=options)

    parameters = [*own, *flags.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def read_options(  # noqa: PLR0913 - one parameter a flag
    *,
    n: Annotated[int, typer.Option(min=0, max=_UINT32, help="Outputs of each prompt.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=_UINT32, help="New tokens at most.")] = None,
    min_tokens: Annotated[int, typer.Option(min=0, max=_UINT32, help="None ends the text before.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False,
    stop_token: Annotated[list[int] | None, typer.Option(help="Id that ends the text; may repeat.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; may repeat.")] = None,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, (0, 1].")] = None,
    top_k: Annotated[int, typer.Option(min=0, max=_UINT32, help="0 = all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the best token's probability.")] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over prompt and output; > 0.")] = None,
    presence_penalty: Annotated[float, typer.Option(help="Over the output; [-2, 2].")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Over the output; [-2, 2].")] = 0.0,
    logit_bias: Annotated[list[str] | None, typer.Option(help="ID=BIAS; may repeat.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=_UINT32, help="With --json: how many to tell.")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(min=0, max=_UINT32, help="With --json: of the prompt.")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File with a schema of the text.")] = None,
    regex: Annotated[str | None, typer.Option(help="Expression that matches the text.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="File with a grammar, GBNF or Lark.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same text.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model; empty = the one served.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    tenant: Annotated[str, typer.Option(help="Who pays; tenants of one priority share alike.")] = "",
    deadline_s: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
) -> GenerateOptions:
    """The options that the flags make.

    Raises:
        ConfigError: a flag cannot be read.
    """
    if sum(given is not None for given in (json_schema, regex, grammar)) > 1:
        wanted = "one of --json-schema, --regex and --grammar"
        raise ConfigError(field="--grammar", wanted=wanted, given="several")
    return GenerateOptions(
        model=model,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token or ()),
        stop=tuple(stop or ()),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(map(_read_bias, logit_bias or ())),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        json_schema=_read_file("--json-schema", json_schema),
        regex=regex,
        grammar=_read_file("--grammar", grammar),
        seed=seed,
        priority=priority,
        tenant=tenant,
        deadline_s=deadline_s,
    )


def _read_file(flag: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(field=flag, wanted="a readable text file", given=f"{path}: {error}") from error


def _read_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        if 0 <= int(token_id) <= _UINT32:
            return int(token_id), float(bias)
    except ValueError:
        pass
    raise ConfigError(field="--logit-bias", wanted="ID=BIAS, as 17=-2.5", given=text)
