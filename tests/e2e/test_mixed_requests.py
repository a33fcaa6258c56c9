"""Requests of every kind at once: each gets what it gets alone, whoever prefills and whoever gives up."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from e2e_cluster import Running, end
from e2e_pages import wait_no_page_is_used
from mixed_requests import (
    EOS_TOKEN_ID,
    MixedRequest,
    answers_alone,
    differences,
    make_mixed,
    options_of,
    with_stops,
)

from benchmarks._one_process import one_process
from cluster.client import Answer, GenerateOptions, InferenceClient
from model.make import make_checkpoint
from wire.proto import inference_pb2

CONTEXT_TOKENS = 16384
PATIENCE_S = 100_000.0
"""Nobody is refused: a worker that has just begun guesses long waits."""
PAGES = {"num_pages": 8192, "max_step_tokens": 96, "max_queue_s": PATIENCE_S}
ROUTER = {"grpc_port": 0, "http_port": 0, "max_wait_s": PATIENCE_S}
COLD = {"page_tokens": 4, "host_tier_bytes": 10_000_000, "disk_tier_bytes": 100_000_000}
FEW_PAGES = PAGES | {"num_pages": 2100, "lookahead_tokens": 4}
"""Room for one request of 8k tokens and a few short ones."""
ROLES: dict[str, dict[str, Any]] = {
    "apart": {"prefill": PAGES, "decode": PAGES},
    "apart-no-reuse": {"prefill": PAGES, "decode": PAGES, "kv": {"page_tokens": 4, "prefix_reuse": False}},
    "apart-drafts": {"prefill": PAGES, "decode": PAGES, "mtp": {"max_drafts": 3}},
    "apart-few-pages-tiers": {"prefill": FEW_PAGES, "decode": FEW_PAGES, "kv": COLD},
    "both": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "both": PAGES | {"replicas": 2}},
}


@dataclass(frozen=True)
class Case:
    """Requests, and what each of them gets alone."""

    requests: list[MixedRequest]
    alone: list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in FP32 with a context that holds 8k tokens."""
    path = tmp_path_factory.mktemp("model") / "long-tiny"
    make_checkpoint(path, size="tiny", seed=0, dtype="float32")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_TOKENS}))
    return path


def make_case(model: Path, *, num: int, longest_tokens: int) -> Case:
    requests = make_mixed(num, seed=20, longest_tokens=longest_tokens, eos_token_id=EOS_TOKEN_ID)
    with one_process(model, prefix_reuse=False) as engine:
        return Case(*with_stops(requests, answers_alone(engine, requests), seed=21))


@pytest.fixture(scope="module")
def few(model: Path) -> Case:
    return make_case(model, num=24, longest_tokens=500)


@pytest.fixture(scope="module")
def many(model: Path) -> Case:
    return make_case(model, num=200, longest_tokens=8000)


ALWAYS = ("apart", "both")
"""The others run in the long form only; tests/integration/workers has them, and more, within one process."""


@pytest.fixture(
    scope="module",
    params=[name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in ROLES],
)
def cluster(request: pytest.FixtureRequest, model: Path, start: Callable[..., Running]) -> Iterator[Running]:
    running = start(ROLES[request.param] | {"model": str(model), "router": ROUTER})
    yield running
    end(running.process)


def test_few_mixed_requests_at_once_get_what_each_gets_alone(cluster: Running, few: Case) -> None:
    check(cluster, few)


@pytest.mark.slow
def test_many_mixed_requests_at_once_get_what_each_gets_alone(cluster: Running, many: Case) -> None:
    check(cluster, many)


TEXTS: tuple[GenerateOptions, ...] = (
    GenerateOptions(stop=("e", "zz"), ignore_eos=True, max_tokens=60),
    GenerateOptions(stop=("th", "a b"), ignore_eos=True, max_tokens=60, temperature=1.0, seed=5),
    GenerateOptions(regex="[a-f]{3,9}-[0-9]{4}", temperature=1.2, seed=6, max_tokens=40),
    GenerateOptions(json_schema='{"type": "array", "items": {"type": "boolean"}}', max_tokens=40),
    GenerateOptions(json_schema='{"type": "integer"}', temperature=1.0, seed=7, max_tokens=12),
    GenerateOptions(logprobs=3, ignore_eos=True, max_tokens=9, temperature=0.7, seed=8),
)


def test_stop_strings_and_structures_among_others_give_what_they_give_alone(
    cluster: Running, few: Case
) -> None:
    address = cluster.shell.members()["router-0"]["address"]
    prompts = [request.prompt for request in few.requests[: len(TEXTS)]]

    async def main() -> None:
        async with InferenceClient(address) as client:
            asks = [partial(ask_text, client, *one) for one in zip(prompts, TEXTS, strict=True)]
            alone = [await one() for one in asks]
            others = [ask(client, request) for request in few.requests]
            answers, _ = await asyncio.gather(
                asyncio.gather(*(one() for one in asks)), asyncio.gather(*others)
            )
            assert answers == alone
            assert all(answer.token_ids for answer in answers)

    asyncio.run(main())


async def ask_text(client: InferenceClient, prompt: Sequence[int], options: GenerateOptions) -> Answer:
    answer = Answer()
    async for message in client.stream(prompt, options):
        answer.add(message)
    return answer


def check(cluster: Running, case: Case) -> None:
    address = cluster.shell.members()["router-0"]["address"]
    answers = asyncio.run(ask_all(address, case.requests))
    assert differences(case.requests, answers, case.alone) == []
    wait_no_page_is_used(cluster)


async def ask_all(address: str, requests: Sequence[MixedRequest]) -> list[list[int]]:
    async with InferenceClient(address) as client:
        return await asyncio.gather(*(ask(client, request) for request in requests))


async def ask(client: InferenceClient, request: MixedRequest) -> list[int]:
    """The answer, or of a client that goes away as much of it as it read."""
    tokens: list[int] = []
    messages = client.stream(request.prompt, options_of(request))
    async for message in messages:
        check_message(message, len(tokens))
        tokens += message.token_ids
        if request.cancel_after_tokens is not None and len(tokens) >= request.cancel_after_tokens:
            await messages.aclose()  # type: ignore[attr-defined] - it is a generator
            return tokens[: request.cancel_after_tokens]
    return tokens


def check_message(message: inference_pb2.GenerateResponse, num_tokens: int) -> None:
    """Nothing repeated, nothing missing."""
    assert message.first_idx == num_tokens
