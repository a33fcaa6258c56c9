"""Requests of every kind at once, in little room: each gets what it gets alone, in every arrangement."""

import asyncio
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from mixed_requests import MixedRequest, answers_alone, differences, make_mixed, message_of, with_stops

from model.checkpoint import Checkpoint
from tests.integration.workers.lab import CacheDtype, Cluster, open_cluster, run_test
from tests.reference_data import checkpoint_dir
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.types import Phase
from workers.config import AttentionConfig, KvConfig

NUM_REQUESTS = 24
LONGEST_TOKENS = 150
FEW_PAGES = 48
"""Of 4 tokens: one long request and a few short ones at a time."""

ARRANGEMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "apart": {"prefill-0": {}, "decode-0": {}},
    "apart-no-reuse": {"prefill-0": {"prefix_reuse": False}, "decode-0": {"prefix_reuse": False}},
    "apart-reuse-in-decode": {"prefill-0": {"prefix_reuse": False}, "decode-0": {}},
    "apart-small-steps": {"prefill-0": {"max_step_tokens": 7}, "decode-0": {"max_step_tokens": 3}},
    "apart-few-pages": {"prefill-0": {"num_pages": FEW_PAGES}, "decode-0": {"num_pages": FEW_PAGES}},
    "both": {"both-0": {}},
    "both-no-reuse": {"both-0": {"prefix_reuse": False}},
    "both-small-steps": {"both-0": {"max_step_tokens": 5, "max_batch_requests": 3}},
    "both-one-token-steps": {"both-0": {"max_step_tokens": 1}},
    "both-two-micro-batches": {"both-0": {"micro_batches": 2}},
    "both-few-pages": {"both-0": {"num_pages": FEW_PAGES}},
    "both-few-pages-no-reuse": {"both-0": {"num_pages": FEW_PAGES, "prefix_reuse": False}},
}
GREEDY_FOR_PAGES = {"num_pages": FEW_PAGES, "lookahead_tokens": 1}
"""Requests start as soon as their prompts fit, and are preempted when others grow."""
GROWTH_TOKENS = 60
"""Longer answers than there is room for."""
PREEMPTED: dict[str, dict[str, dict[str, Any]]] = {
    "apart-short-of-pages": {"prefill-0": {}, "decode-0": GREEDY_FOR_PAGES},
    "both-preempted": {"both-0": GREEDY_FOR_PAGES},
    "both-preempted-no-reuse": {"both-0": GREEDY_FOR_PAGES | {"prefix_reuse": False}},
    "both-preempted-small-steps": {"both-0": GREEDY_FOR_PAGES | {"max_step_tokens": 6}},
}
DRAFTING: dict[str, dict[str, dict[str, Any]]] = {
    "apart-drafts": {"prefill-0": {}, "decode-0": {"num_drafts": 3}},
    "both-drafts": {"both-0": {"num_drafts": 3}},
    "both-drafts-few-pages": {"both-0": GREEDY_FOR_PAGES | {"num_drafts": 2}},
    "both-drafts-small-steps-no-reuse": {
        "both-0": {"num_drafts": 4, "max_step_tokens": 6, "prefix_reuse": False}
    },
}
"""For a model with an MTP layer."""
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    f"{roles}-{dtype}-cache": {name: {"cache_dtype": dtype} for name in names}
    for dtype in ("bfloat16", "fp8")
    for roles, names in {"apart": ("prefill-0", "decode-0"), "both": ("both-0",)}.items()
}
"""Cached rows in fewer bytes: another text, the same in every arrangement."""
TIERS: dict[str, dict[str, dict[str, Any]]] = {
    "both-host": {"both-0": {"host_tier_bytes": 1 << 26}},
    "both-disk": {"both-0": {"disk_tier_bytes": 1 << 26}},
    "apart": {
        "prefill-0": {"host_tier_bytes": 1 << 18, "disk_tier_bytes": 1 << 26},
        "decode-0": {"disk_tier_bytes": 1 << 26, "max_step_tokens": 7},
    },
}
"""Full pages that the few of the cache make room for come back from memory and files."""
CASES = [
    *((shape, name) for shape in ("sparse", "mtp") for name in ARRANGEMENTS | PREEMPTED),
    *(("mtp", name) for name in DRAFTING | FORMS),
]


@functools.cache
def case(shape: str, more_tokens: int, cache_dtype: CacheDtype) -> tuple[list[MixedRequest], list[list[int]]]:
    """Requests, and the answers of one process that gets them one by one, unchunked and uncancelled."""
    longest_tokens = LONGEST_TOKENS - more_tokens
    requests = [
        replace(request, max_tokens=request.max_tokens + more_tokens)
        for request in make_mixed(NUM_REQUESTS, seed=5, longest_tokens=longest_tokens)
    ]
    checkpoint = Checkpoint.open(checkpoint_dir(shape))
    config = EngineConfig(
        group=AttentionConfig(num_pages=64), kv=KvConfig(prefix_reuse=False, dtype=cache_dtype)
    )
    engine = build_whole_engine(checkpoint, config=config, metrics=Metrics("attention"))
    engine.start()
    try:
        return with_stops(requests, answers_alone(engine, requests), seed=6)
    finally:
        engine.stop()


@pytest.mark.parametrize(("shape", "arrangement"), CASES)
def test_mixed_requests_at_once_get_what_each_gets_alone(shape: str, arrangement: str) -> None:
    workers = (ARRANGEMENTS | PREEMPTED | DRAFTING | FORMS)[arrangement]
    cache_dtype = next(iter(workers.values())).get("cache_dtype", "float32")
    requests, alone = case(shape, GROWTH_TOKENS if arrangement in PREEMPTED else 0, cache_dtype)

    async def main() -> None:
        async with open_cluster(shape, attention=workers) as cluster:
            answers = await asyncio.gather(*(ask(cluster, request) for request in requests))
            assert differences(requests, answers, alone) == []
            assert num_preempted(cluster) > 0 or arrangement not in PREEMPTED
            assert (num_drafted(cluster) > 0) == (arrangement in DRAFTING)

    run_test(main())


@pytest.mark.parametrize("arrangement", TIERS)
def test_mixed_requests_asked_again_get_the_same_from_cold_pages(arrangement: str, tmp_path: Path) -> None:
    """Twice at once; the second time prompts have left the cache and come back from below."""
    where = {"num_pages": FEW_PAGES, "disk_tier_dir": str(tmp_path)}
    workers = {name: where | fields for name, fields in TIERS[arrangement].items()}
    requests, alone = case("sparse", 0, "float32")

    async def main() -> None:
        async with open_cluster("sparse", attention=workers) as cluster:
            for _ in range(2):
                answers = await asyncio.gather(*(ask(cluster, request) for request in requests))
                assert differences(requests, answers, alone) == []
            hits = [
                cluster.metric(name, "kv_tier_hits_total", tier=tier)
                for name in cluster.attention
                for tier in ("host", "disk")
            ]
            assert sum(hits) > 0

    run_test(main())
    assert not list(tmp_path.glob("moray-pages-*/"))


def num_preempted(cluster: Cluster) -> float:
    """Sequences that gave their pages up, of all workers."""
    return sum(
        cluster.metric(name, "preemptions_total", state=phase.value)
        for name in cluster.attention
        for phase in Phase
    )


def num_drafted(cluster: Cluster) -> float:
    """Tokens drafted by all workers."""
    return sum(
        cluster.metric(name, "drafts_total", position="1", outcome=outcome)
        for name in cluster.attention
        for outcome in ("accepted", "rejected")
    )


async def ask(cluster: Cluster, request: MixedRequest) -> list[int]:
    """The answer, or of a client that goes away as much of it as it read."""
    call = cluster.open_generate(
        request.prompt,
        at=next(name for name in cluster.attention if not name.startswith("prefill")),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        sampling=message_of(request.sampling),
    )
    tokens: list[int] = []
    while (event := await call.read()) is not grpc.aio.EOF:
        tokens += event.token_ids
        if request.cancel_after_tokens is not None and len(tokens) >= request.cancel_after_tokens:
            call.cancel()
            return tokens[: request.cancel_after_tokens]
    return tokens
