"""Requests of every kind, and what each gets when it is asked alone: what busy workers are held to."""

import queue
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.client import GenerateOptions
from wire.proto.common_pb2 import SamplingParams
from workers.attention.engine import Engine
from workers.attention.types import Event, Failed, NewToken, Sampling, SequenceSpec, Source

MOST_NEW_TOKENS = 24
NUM_PREFIXES = 3
EOS_TOKEN_ID, FIRST_BYTE_ID, NUM_BYTES = 1, 3, 256
"""The byte tokenizer's ids of bytes, which every checkpoint of the tests has."""


@dataclass(frozen=True, kw_only=True)
class MixedRequest:
    """One request, and when its client goes away."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int] = frozenset()
    cancel_after_tokens: int | None = None
    """None = the client stays to the end."""


def make_mixed(
    num: int, *, seed: int, longest_tokens: int, eos_token_id: int | None = None
) -> list[MixedRequest]:
    """Requests with prompts of 1 token to `longest_tokens`, short ones as often as long ones.

    Every third shares its beginning with others, every fifth is given up, half of them are sampled.
    """
    rng = random.Random(seed)
    prefixes = [_tokens(rng, longest_tokens) for _ in range(NUM_PREFIXES)]
    return [_request(i, rng, prefixes, eos_token_id) for i in range(num)]


def _request(
    idx: int, rng: random.Random, prefixes: Sequence[tuple[int, ...]], eos_token_id: int | None
) -> MixedRequest:
    longest = len(prefixes[0])
    length = 1 if idx == 0 else longest if idx == 1 else round(longest ** rng.random())
    prompt = _tokens(rng, length)
    if idx % 3 == 0:
        num_shared = rng.randint(0, length)
        prompt = rng.choice(prefixes)[:num_shared] + prompt[num_shared:]
    max_tokens = rng.randint(1, MOST_NEW_TOKENS)
    stops = {eos_token_id} if eos_token_id is not None and rng.random() < 0.5 else set()
    return MixedRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(rng) if idx % 2 else Sampling(),
        stop_token_ids=frozenset(stops),
        cancel_after_tokens=rng.randint(1, max_tokens) if idx % 5 == 4 else None,
    )


def _tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(FIRST_BYTE_ID + rng.randrange(NUM_BYTES) for _ in range(length))


def _sampling(rng: random.Random) -> Sampling:
    return Sampling(
        temperature=rng.choice((0.3, 0.8, 1.5)),
        top_p=rng.choice((0.5, 0.9, 1.0)),
        top_k=rng.choice((0, 5, 40)),
        min_p=rng.choice((0.0, 0.0625)),
        seed=rng.getrandbits(64),
        repetition_penalty=rng.choice((1.0, 1.25)),
        presence_penalty=rng.choice((0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, -0.25)),
        logit_bias=((FIRST_BYTE_ID + rng.randrange(NUM_BYTES), 2.5),) if rng.random() < 0.5 else (),
    )


def message_of(sampling: Sampling) -> SamplingParams:
    """The parameters as a worker gets them."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )


def options_of(request: MixedRequest) -> GenerateOptions:
    """The request as a client of the router asks it."""
    return GenerateOptions(
        max_tokens=request.max_tokens,
        ignore_eos=EOS_TOKEN_ID not in request.stop_token_ids,
        stop_token_ids=tuple(sorted(request.stop_token_ids - {EOS_TOKEN_ID})),
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        top_k=request.sampling.top_k,
        min_p=request.sampling.min_p,
        repetition_penalty=request.sampling.repetition_penalty,
        presence_penalty=request.sampling.presence_penalty,
        frequency_penalty=request.sampling.frequency_penalty,
        logit_bias=dict(request.sampling.logit_bias),
        seed=request.sampling.seed,
    )


def with_stops(
    requests: Iterable[MixedRequest], answers: Iterable[list[int]], *, seed: int
) -> tuple[list[MixedRequest], list[list[int]]]:
    """The same requests, every second one stopped by a token of its own answer, and what they then get."""
    rng = random.Random(seed)
    stopped, cut = [], []
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        stops = request.stop_token_ids | ({rng.choice(answer)} if i % 2 else set())
        stopped.append(replace(request, stop_token_ids=stops))
        ends = [idx + 1 for idx, token in enumerate(answer) if token in stops]
        cut.append(answer[: min(ends, default=len(answer))])
    return stopped, cut


def answers_alone(engine: Engine, requests: Iterable[MixedRequest]) -> list[list[int]]:
    """The whole answer of every request, as if nobody gave up; one after another."""
    return [_answer(engine, f"alone-{i}", request) for i, request in enumerate(requests)]


def _answer(engine: Engine, request_id: str, request: MixedRequest) -> list[int]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    spec = SequenceSpec(
        request_id=request_id,
        attempt=0,
        token_ids=request.prompt,
        num_prompt_tokens=len(request.prompt),
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        sampling=request.sampling,
        source=Source.LOCAL,
    )
    engine.submit(spec, events.put)
    tokens: list[int] = []
    while True:
        event = events.get(timeout=120)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, NewToken):
            tokens.append(event.token_id)
            if event.finish is not None:
                return tokens


def differences(
    requests: Sequence[MixedRequest], answers: Sequence[list[int]], alone: Sequence[list[int]]
) -> list[str]:
    """What is wrong with some answers: of a client that went away, the part that it got is compared."""
    return [
        f"request {i} ({len(request.prompt)} tokens, {request.sampling}): {got} instead of {wanted}"
        for i, (request, got, wanted) in enumerate(zip(requests, answers, alone, strict=True))
        if got != wanted[: request.cancel_after_tokens]
    ]
