"""Several outputs of one request: each is a request of its own to the workers, and their messages mix."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from hashlib import blake2b
from typing import TypeVar

from router.requests.types import AdmittedRequest
from wire.proto import common_pb2

_T = TypeVar("_T")


def plan_outputs(request: AdmittedRequest, num_outputs: int) -> tuple[AdmittedRequest, ...]:
    """The requests to workers that answer one request.

    The first is the request itself, so that asking for more changes nothing of it; the others differ in the
    name that workers know them by, in the seed, and in that the prompt is told about once.
    """
    return tuple(_plan_output(request, output_idx) for output_idx in range(num_outputs))


def _plan_output(request: AdmittedRequest, output_idx: int) -> AdmittedRequest:
    if output_idx == 0:
        return request
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.ClearField("prompt_logprobs")
    sampling.seed = derive_seed(sampling.seed, output_idx)
    return dataclasses.replace(request, wire_id=f"{request.wire_id}.{output_idx}", sampling=sampling)


def derive_seed(seed: int, output_idx: int) -> int:
    """The seed of an output, 64 bits, the same everywhere; output 0 has the request's own."""
    if output_idx == 0:
        return seed
    key = seed.to_bytes(8, "little") + output_idx.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


async def merge_streams(streams: Sequence[AsyncGenerator[_T, None]]) -> AsyncGenerator[tuple[int, _T], None]:
    """What the streams yield, each with its stream's index, as it comes; ends when all have.

    No stream runs ahead: each waits until its last item is taken. The first error is raised, and however this
    ends, every stream is closed.
    """
    waiting: dict[asyncio.Task[_T], int] = {}
    async with contextlib.AsyncExitStack() as stack:
        for stream in streams:
            stack.push_async_callback(stream.aclose)
        stack.push_async_callback(_cancel_all, waiting)
        for stream_idx, stream in enumerate(streams):
            waiting[_take_next(stream)] = stream_idx
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                stream_idx = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    item = task.result()
                    yield stream_idx, item
                    waiting[_take_next(streams[stream_idx])] = stream_idx


def _take_next(stream: AsyncGenerator[_T, None]) -> "asyncio.Task[_T]":
    async def take() -> _T:
        return await anext(stream)

    return asyncio.get_running_loop().create_task(take())


async def _cancel_all(waiting: "dict[asyncio.Task[_T], int]") -> None:
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
