"""Counts one request: its status, its tokens, its waits."""

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from wire.errors import MorayError
from wire.metrics import Metrics
from wire.proto import inference_pb2
from wire.rpc import Context


class RequestMeter:
    """One `with` block a request; whatever ends the block is the request's status."""

    def __init__(self, metrics: Metrics, context: Context) -> None:
        self._metrics = metrics
        self._context = context
        self._began_s = time.perf_counter()
        self._output_to_last_s: dict[int, float] = {}
        """When an output's last tokens went out."""

    def __enter__(self) -> Self:
        self._metrics.gauge("active_requests").inc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.gauge("active_requests").dec()
        self._metrics.counter("requests_total", code=self._code(error).name).inc()

    def count(self, message: inference_pb2.GenerateResponse) -> None:
        """A message goes to the client."""
        if not message.token_ids:
            return
        now_s, output_idx = time.perf_counter(), message.output_idx
        name = "token_gap_seconds" if output_idx in self._output_to_last_s else "first_token_seconds"
        last_s = self._output_to_last_s.get(output_idx, self._began_s)
        self._metrics.histogram(name).observe(now_s - last_s)
        self._metrics.counter("generated_tokens_total").inc(len(message.token_ids))
        self._output_to_last_s[output_idx] = now_s

    def _code(self, error: BaseException | None) -> grpc.StatusCode:
        if error is None:
            return grpc.StatusCode.OK
        if isinstance(error, MorayError):
            return error.code
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            left_s = self._context.time_remaining()
            has_passed = left_s is not None and left_s <= 0
            return grpc.StatusCode.DEADLINE_EXCEEDED if has_passed else grpc.StatusCode.CANCELLED
        return grpc.StatusCode.INTERNAL
