"""The client of the gRPC API, against a router on a Unix socket: requests it makes, errors it raises."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.client import GenerateOptions, InferenceClient, make_request, shut_down
from wire.errors import DeadlinePassed, InvalidRequest, MorayError, NotReady, WorkerLost
from wire.proto import inference_pb2, inference_pb2_grpc
from wire.proto.common_pb2 import SamplingParams
from wire.rpc import abort_with

OPTIONS = GenerateOptions()


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Answers each prompt with its ids plus one, two messages; then ends as told."""

    def __init__(self, end: Callable[[Any], Awaitable[None]] | None = None, *, num_messages: int = 2) -> None:
        self._end = end
        self._num_messages = num_messages

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        ids = [token_id + 1 for token_id in request.tokens.ids]
        for part in (ids[:1], ids[1:])[: self._num_messages]:
            yield inference_pb2.GenerateResponse(token_ids=part)
        if self._end is not None:
            await self._end(context)


def ask(tmp_path: Path, router: FakeRouter, prompts: list[list[int]], options: Any = OPTIONS) -> Any:
    """What the client makes of a router's answers."""

    async def asked() -> list[list[int]]:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
        address = f"unix:{tmp_path}/router.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            async with InferenceClient(address) as client:
                return await client.all_tokens(prompts, options)
        finally:
            await server.stop(None)

    return asyncio.run(asked())


def failure(tmp_path: Path, router: FakeRouter, options: Any = OPTIONS) -> MorayError:
    with pytest.raises(MorayError) as caught:
        ask(tmp_path, router, [[1, 2]], options)
    return caught.value


def test_text_and_options_are_in_the_request() -> None:
    options = GenerateOptions(
        model="m", max_tokens=7, ignore_eos=True, top_p=0.5, top_k=3, seed=9, priority=-2, tenant="t"
    )
    request = make_request("Hello", options)
    assert (request.priority, request.tenant) == (-2, "t")
    assert (request.text, request.model, request.max_tokens, request.ignore_eos) == ("Hello", "m", 7, True)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.5, 3, 9)


def test_every_sampling_parameter_is_in_the_request() -> None:
    numbers = {"min_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.5}
    options = GenerateOptions(
        **numbers, min_tokens=3, logit_bias={7: -2.5}, stop_token_ids=(8, 9), stop=("END",)
    )
    request = make_request("Hello", options)
    assert request.sampling == SamplingParams(**numbers, min_tokens=3, logit_bias={7: -2.5})
    assert make_request("Hello", GenerateOptions(logprobs=0)).sampling.HasField("logprobs")
    assert make_request("Hello", GenerateOptions(prompt_logprobs=3)).sampling.prompt_logprobs == 3
    assert (list(request.stop_token_ids), list(request.stop)) == ([8, 9], ["END"])


@pytest.mark.parametrize("kind", ["json_schema", "regex", "grammar"])
def test_structure_is_in_the_request(kind: str) -> None:
    request = make_request("Hello", GenerateOptions(**{kind: "x"}))
    assert request.sampling == SamplingParams(**{kind: "x"})
    assert make_request("Hello", OPTIONS).sampling.WhichOneof("structure") is None


def test_token_ids_are_in_the_request() -> None:
    request = make_request([3, 1, 4], OPTIONS)
    assert request.WhichOneof("prompt") == "tokens"
    assert list(request.tokens.ids) == [3, 1, 4]


def test_what_is_not_given_is_left_to_the_router() -> None:
    request = make_request("x", OPTIONS)
    given = [
        request.HasField("max_tokens"),
        *map(request.sampling.HasField, ("top_p", "seed", "repetition_penalty")),
    ]
    assert given == [False] * 4


def test_zero_max_tokens_travels_to_the_router() -> None:
    assert make_request("x", GenerateOptions(max_tokens=0)).HasField("max_tokens")


def test_answers_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    assert ask(tmp_path, FakeRouter(), [[1, 2], [5, 6, 7]]) == [[2, 3], [6, 7, 8]]


def test_error_of_the_router_comes_back_as_itself(tmp_path: Path) -> None:
    refusal = InvalidRequest("max_tokens must be at least 1", field="max_tokens")
    error = failure(tmp_path, FakeRouter(lambda context: abort_with(context, refusal)))
    assert (type(error), error.message, error.field) == (InvalidRequest, refusal.message, "max_tokens")


def test_unavailable_by_the_router_is_not_taken_for_a_broken_connection(tmp_path: Path) -> None:
    refusal = NotReady("the cluster waits for decode-0")
    error = failure(tmp_path, FakeRouter(lambda context: abort_with(context, refusal), num_messages=0))
    assert (type(error), error.message) == (NotReady, refusal.message)


def test_no_router_names_the_address_and_what_to_do(tmp_path: Path) -> None:
    async def asked() -> None:
        async with InferenceClient(f"unix:{tmp_path}/none.sock") as client:
            await client.tokens("x", OPTIONS)

    with pytest.raises(NotReady) as caught:
        asyncio.run(asked())
    message = caught.value.message
    assert f"no router answers at unix:{tmp_path}/none.sock" in message
    assert "`moray up`" in message
    assert "--address" in message


def test_status_without_a_router_says_the_same(tmp_path: Path) -> None:
    async def asked() -> None:
        async with InferenceClient(f"unix:{tmp_path}/none.sock") as client:
            await client.cluster()

    with pytest.raises(NotReady, match=r"no router answers at unix:.*none\.sock"):
        asyncio.run(asked())


def test_router_lost_in_the_middle_is_told_apart(tmp_path: Path) -> None:
    def close(context: Any) -> Awaitable[None]:
        return context.abort(grpc.StatusCode.UNAVAILABLE, "recvmsg: Socket closed")

    error = failure(tmp_path, FakeRouter(close), GenerateOptions(num_resumes=1))
    assert isinstance(error, WorkerLost)
    assert "went away (Socket closed)" in error.message


def test_deadline_is_named(tmp_path: Path) -> None:
    seconds_left: list[float] = []

    async def hang(context: Any) -> None:
        seconds_left.append(context.time_remaining())
        await asyncio.Event().wait()

    error = failure(tmp_path, FakeRouter(hang), GenerateOptions(deadline_s=1.0))
    assert isinstance(error, DeadlinePassed)
    # gRPC rounds the deadline up on its way; without one there would be no number here.
    assert [left < 2.0 for left in seconds_left] == [True]
    assert "before the deadline" in error.message


def test_shutdown_of_nothing_names_the_address(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"no controller answers at unix:.*none\.sock"):
        asyncio.run(shut_down(f"unix:{tmp_path}/none.sock", deadline_s=5))
