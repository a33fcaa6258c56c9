"""Sends a load to a router and notes what became of every request."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from cluster.bench.load.types import LoadRequest, Outcome
from cluster.client import GenerateOptions, InferenceClient
from wire.errors import MorayError, Overloaded

OnProgress = Callable[[int, int], None]
"""(requests that ended, requests in all)."""


@dataclass(frozen=True, kw_only=True)
class DriveSpec:
    """How requests are sent."""

    address: str
    """host:port of the router."""
    connections: int
    """Requests take turns on so many."""
    clients: int
    """Of a closed loop: each asks again when it has its answer; 0 = every request at its own moment."""
    deadline_s: float | None
    """Of each request; None = none."""


def drive(spec: DriveSpec, requests: Sequence[LoadRequest], *, on_progress: OnProgress) -> list[Outcome]:
    """Sends every request when it is due; returns when all have ended, in their order."""
    return asyncio.run(_drive(spec, requests, on_progress))


async def _drive(spec: DriveSpec, requests: Sequence[LoadRequest], on_progress: OnProgress) -> list[Outcome]:
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(InferenceClient(spec.address, has_own_connection=True))
            for _ in range(spec.connections)
        ]
        for client in clients:
            # Connects before the clock runs.
            await client.cluster()
        return await _Load(spec, clients, on_progress).run(requests)


class _Load:
    """One run; everything on one loop."""

    def __init__(self, spec: DriveSpec, clients: Sequence[InferenceClient], on_progress: OnProgress) -> None:
        self._spec = spec
        self._clients = clients
        self._on_progress = on_progress
        self._began_s = 0.0
        self._num_ended = 0

    async def run(self, requests: Sequence[LoadRequest]) -> list[Outcome]:
        self._began_s = time.monotonic()
        self._on_progress(0, len(requests))
        room = asyncio.Semaphore(self._spec.clients or len(requests))

        async def one(idx: int, request: LoadRequest) -> Outcome:
            if not self._spec.clients:
                await asyncio.sleep(request.at_s - self._now_s())
            async with room:
                due_s = self._now_s() if self._spec.clients else request.at_s
                outcome = await self._ask(self._clients[idx % len(self._clients)], request, due_s)
            self._num_ended += 1
            self._on_progress(self._num_ended, len(requests))
            return outcome

        return await asyncio.gather(*(one(idx, request) for idx, request in enumerate(requests)))

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    async def _ask(self, client: InferenceClient, request: LoadRequest, due_s: float) -> Outcome:
        options = GenerateOptions(
            max_tokens=request.max_tokens, ignore_eos=True, deadline_s=self._spec.deadline_s
        )
        sent_s, token_s = self._now_s(), list[float]()
        num_cached_tokens, error, is_refused, retry_after_s = 0, "", False, 0.0
        try:
            async for message in client.stream(request.prompt, options):
                token_s += [self._now_s()] * len(message.token_ids)
                num_cached_tokens = max(num_cached_tokens, message.usage.cached_tokens)
        except MorayError as caught:
            error = f"{type(caught).__name__}: {caught.message}"
            is_refused = isinstance(caught, Overloaded) and not token_s
            retry_after_s = caught.retry_after_s
        return Outcome(
            due_s=due_s,
            sent_s=sent_s,
            ended_s=self._now_s(),
            token_s=tuple(token_s),
            num_prompt_tokens=len(request.prompt),
            num_cached_tokens=num_cached_tokens,
            is_refused=is_refused,
            retry_after_s=retry_after_s,
            error=error,
        )
