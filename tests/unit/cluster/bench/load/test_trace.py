"""Mooncake's trace format: what a line becomes, which prompts share tokens, and what is refused."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.bench.load.trace import TraceRules, read_trace, requests_of
from cluster.bench.load.types import LoadRequest
from wire.errors import ConfigError

VOCAB_TOKENS = 500
LINES = [
    {"timestamp": 1000, "input_length": 700, "output_length": 40, "hash_ids": [0, 1]},
    {"timestamp": 1000, "input_length": 1024, "output_length": 3, "hash_ids": [0, 2]},
    {"timestamp": 4000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 2, 3]},
]


def make(lines: Sequence[dict[str, Any]], **rules: Any) -> list[LoadRequest]:
    traced = read_trace([json.dumps(line) + "\n" for line in lines], name="some.jsonl")
    return requests_of(traced, vocab_tokens=VOCAB_TOKENS, rules=TraceRules(**rules))


def test_a_trace_begins_at_once_and_keeps_its_gaps_and_lengths() -> None:
    requests = make(LINES)
    assert [request.at_s for request in requests] == [0, 0, 3]
    assert [len(request.prompt) for request in requests] == [700, 1024, 1100]
    assert [request.max_tokens for request in requests] == [40, 3, 500]


def test_equal_ids_are_equal_blocks_and_others_differ() -> None:
    first, second, third = (request.prompt for request in make(LINES))
    assert first[:512] == second[:512] == third[:512]
    assert second[512:1024] == third[512:1024]
    assert first[512:700] != second[512:700]


def test_speed_divides_the_gaps() -> None:
    assert [request.at_s for request in make(LINES, speed=6)] == [0, 0, 0.5]


def test_a_scale_shrinks_lengths_and_blocks_alike() -> None:
    first, second, third = make(LINES, token_scale=1 / 32)
    assert [len(request.prompt) for request in (first, second, third)] == [22, 32, 34]
    assert [request.max_tokens for request in (first, second, third)] == [1, 1, 16]
    assert first.prompt[:16] == second.prompt[:16]
    assert first.prompt[16:22] != second.prompt[16:22]
    assert second.prompt == third.prompt[:32]


def test_only_the_first_requests_are_taken() -> None:
    assert make(LINES, num_requests=2) == make(LINES)[:2]


def test_the_seed_chooses_the_tokens() -> None:
    assert make(LINES, seed=1) == make(LINES, seed=1) != make(LINES, seed=2)


def test_blocks_without_ids_are_shared_with_nobody() -> None:
    bare = [line | {"hash_ids": [0]} for line in LINES[1:]]
    first, second = (request.prompt for request in make(bare))
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]


def test_lines_are_sorted_by_time_and_empty_ones_skipped() -> None:
    lines = [json.dumps(LINES[2]), "", "  \n", json.dumps(LINES[0])]
    assert [request.at_ms for request in read_trace(lines, name="some")] == [1000, 4000]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "some.jsonl:2"),
        ("[1, 2]", "some.jsonl:2"),
        ('{"timestamp": 0, "input_length": 5}', "output_length"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "below 1"),
        ('{"timestamp": -1, "input_length": 3, "output_length": 1}', "negative"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": ["x"]}', "ValueError"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": 4}', "TypeError"),
    ],
)
def test_a_wrong_line_is_named(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_trace([json.dumps(LINES[0]), line], name="some.jsonl")


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one request"):
        read_trace(["\n"], name="some.jsonl")
