"""One request in the metrics: status, tokens, waits."""

import asyncio

import pytest

from router.front.meter import RequestMeter
from wire.errors import InvalidRequest, Overloaded
from wire.metrics import Metrics
from wire.proto.inference_pb2 import GenerateResponse


class FakeContext:
    def __init__(self, left_s=None):
        self._left_s = left_s

    def time_remaining(self):
        return self._left_s


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"moray_router_{name}", labels)


@pytest.mark.parametrize(
    ("error", "left_s", "code"),
    [
        (None, None, "OK"),
        (InvalidRequest("x"), None, "INVALID_ARGUMENT"),
        (Overloaded("x"), None, "RESOURCE_EXHAUSTED"),
        (asyncio.CancelledError(), None, "CANCELLED"),
        (asyncio.CancelledError(), 5.0, "CANCELLED"),
        (asyncio.CancelledError(), 0.0, "DEADLINE_EXCEEDED"),
        (ZeroDivisionError(), None, "INTERNAL"),
    ],
)
def test_status_is_counted_by_code(error, left_s, code):
    metrics = Metrics("router")
    meter = RequestMeter(metrics, FakeContext(left_s))
    with meter:
        assert value(metrics, "active_requests") == 1
    meter.__exit__(type(error) if error else None, error, None)
    assert value(metrics, "requests_total", code=code) == (2 if error is None else 1)


def test_tokens_and_waits_are_observed():
    metrics = Metrics("router")
    with RequestMeter(metrics, FakeContext()) as meter:
        for first_idx, ids in ((0, (7, 8)), (2, (9,)), (3, ())):
            meter.count(GenerateResponse(first_idx=first_idx, token_ids=ids))
    assert value(metrics, "generated_tokens_total") == 3
    assert value(metrics, "first_token_seconds_count") == 1
    assert value(metrics, "token_gap_seconds_count") == 1


def test_outputs_of_one_request_have_first_tokens_and_gaps_of_their_own():
    metrics = Metrics("router")
    with RequestMeter(metrics, FakeContext()) as meter:
        for output_idx in (0, 1, 1, 2):
            meter.count(GenerateResponse(token_ids=[7], output_idx=output_idx))
    assert value(metrics, "first_token_seconds_count") == 3
    assert value(metrics, "token_gap_seconds_count") == 1
