"""Prefill here, decode there, experts elsewhere: the text and the scores are those of one process."""

import asyncio
import queue
import random

import pytest
import torch

from model.checkpoint import Checkpoint
from model.precision import Precision
from tests.integration.workers.lab import PAGE_TOKENS, Cluster, open_cluster, run_test
from tests.reference_data import INDEX_MARGIN, LOGIT_TOLERANCE, SHAPES, Golden, checkpoint_dir, goldens
from wire.metrics import Metrics
from wire.phases import PHASES
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.scoring import ScoreSpec
from workers.attention.types import NewToken, Sampling, SequenceSpec, Source
from workers.config import AttentionConfig, ComputeConfig

LENGTHS = (1, 2, PAGE_TOKENS, PAGE_TOKENS + 1, 17, 30, 10 * PAGE_TOKENS + 1, 75)


def one_process(
    shape: str, prompts: list[tuple[int, ...]], num_tokens: int, sampling: Sampling
) -> list[list[int]]:
    """The text of each prompt, alone, in an engine that holds every expert."""
    checkpoint = Checkpoint.open(checkpoint_dir(shape))
    engine = build_whole_engine(
        checkpoint,
        config=EngineConfig(group=AttentionConfig(num_pages=64)),
        metrics=Metrics("attention"),
    )
    engine.start()
    try:
        return [_text(engine, prompt, num_tokens, sampling) for prompt in prompts]
    finally:
        engine.stop()


def _text(engine: object, prompt: tuple[int, ...], num_tokens: int, sampling: Sampling) -> list[int]:
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    spec = SequenceSpec(
        request_id=str(prompt),
        attempt=0,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_tokens=num_tokens,
        stop_token_ids=frozenset(),
        sampling=sampling,
        source=Source.LOCAL,
    )
    engine.submit(spec, events.put)
    tokens = []
    while len(tokens) < num_tokens:
        event = events.get(timeout=30)
        if isinstance(event, NewToken):
            tokens.append(event.token_id)
    return tokens


def mixed_prompts() -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [tuple(rng.randrange(3, 320) for _ in range(length)) for length in LENGTHS]


@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_text_and_scores_are_those_of_the_goldens(shape: str, num_experts: int) -> None:
    """All prompts of a shape at once through prefill and decode, and each scored meanwhile."""

    async def main() -> None:
        cases = goldens(shape)
        async with open_cluster(shape, num_experts=num_experts) as cluster:
            texts = asyncio.gather(
                *(cluster.generate(g.prompt, max_tokens=len(g.tensor("greedy"))) for g in cases)
            )
            for golden in cases:
                check_scores(golden, await cluster.score(golden.prompt, at="prefill-0", chunk_tokens=13))
            assert await texts == [golden.tensor("greedy").tolist() for golden in cases]

    run_test(main())


def check_scores(golden: Golden, tensors: dict[str, torch.Tensor]) -> None:
    limit = LOGIT_TOLERANCE * golden.logit_std
    assert (tensors["logits"] - golden.tensor("logits")).abs().max() <= limit
    layers = [layer for layer in range(8) if golden.has(f"router_ids.{layer}")]
    wanted = torch.stack([golden.tensor(f"router_ids.{layer}").int() for layer in layers])
    assert torch.equal(tensors["expert_ids"], wanted)
    weights = torch.stack([golden.tensor(f"router_weights.{layer}") for layer in layers])
    torch.testing.assert_close(tensors["expert_weights"], weights, rtol=1e-5, atol=1e-5)
    for layer, ids_TU in enumerate(tensors["indexer_ids"]):
        if golden.has(f"index.{layer}"):
            differs = different_sets(ids_TU, golden.tensor(f"index.{layer}"))
            assert (golden.tensor(f"index_margin.{layer}")[differs] < INDEX_MARGIN).all()
    assert ("mtp_logits" in tensors) == (golden.has("mtp.logits") and len(golden.prompt) > 1)
    if "mtp_logits" in tensors:
        assert (tensors["mtp_logits"] - golden.tensor("mtp.logits")).abs().max() <= limit


def different_sets(got_TU: torch.Tensor, wanted_TU: torch.Tensor) -> torch.Tensor:
    """(T,) bool: rows that name different positions, padding (-1) left aside."""
    rows = zip(got_TU.tolist(), wanted_TU.tolist(), strict=True)
    return torch.tensor([set(got) - {-1} != set(wanted) - {-1} for got, wanted in rows])


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 12},
        {
            "temperature": 0.75,
            "min_p": 0.0625,
            "repetition_penalty": 1.25,
            "frequency_penalty": 0.5,
            "seed": 12,
        },
    ],
    ids=["greedy", "seed", "penalties"],
)
def test_eight_mixed_prompts_at_once_equal_one_process(num_experts: int, sampling: dict[str, float]) -> None:
    prompts = mixed_prompts()
    expected = one_process("sparse", prompts, 12, Sampling(**sampling))

    async def main() -> None:
        async with open_cluster("sparse", num_experts=num_experts) as cluster:
            calls = [cluster.generate(prompt, max_tokens=12, sampling=sampling) for prompt in prompts]
            assert await asyncio.gather(*calls) == expected

    run_test(main())


@pytest.mark.parametrize(("dtype", "num_experts"), [("float32", 3), ("int8", 1), ("int8", 3)])
def test_scores_are_those_of_one_process_bit_for_bit(dtype: Precision, num_experts: int) -> None:
    golden = goldens("mtp")[2]
    checkpoint = Checkpoint.open(checkpoint_dir("mtp"))
    config = EngineConfig(group=AttentionConfig(num_pages=64), compute=ComputeConfig(dtype=dtype))
    engine = build_whole_engine(checkpoint, config=config, metrics=Metrics("attention"))
    engine.start()
    alone = engine.score(ScoreSpec(token_ids=golden.prompt, chunk_tokens=11)).result(timeout=30)
    engine.stop()

    async def main() -> None:
        async with open_cluster("mtp", num_experts=num_experts, dtype=dtype) as cluster:
            got = await cluster.score(golden.prompt, at="decode-0", chunk_tokens=7)
            assert got.keys() == alone.keys()
            assert [name for name in alone if not torch.equal(got[name], alone[name])] == []

    run_test(main())


def test_worker_of_both_roles_needs_no_other() -> None:
    golden = goldens("yarn")[2]

    async def main() -> None:
        async with open_cluster("yarn", attention={"both-0": {}}) as cluster:
            assert (
                await cluster.generate(golden.prompt, at="both-0", max_tokens=16)
                == golden.tensor("greedy").tolist()
            )

    run_test(main())


def test_replicas_share_the_rows_and_change_nothing() -> None:
    """Both workers hold every expert: each computes its part, by how quick it was; the text is the same."""
    golden = goldens("default")[3]

    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            await cluster.start_expert("expert-1", range(16))
            await cluster.push()
            assert await cluster.generate(golden.prompt, max_tokens=16) == golden.tensor("greedy").tolist()
            rows = [
                sum(cluster.metric(f"expert-{i}", "rows_total", phase=phase) for phase in PHASES)
                for i in range(2)
            ]
            assert 0.2 < rows[0] / sum(rows) < 0.8

    run_test(main())


def test_phases_with_workers_of_their_own_change_nothing_even_when_one_is_lost() -> None:
    """Prefill and decode are computed apart; without its worker decode takes the copies of prefill."""
    golden = goldens("default")[3]
    greedy = golden.tensor("greedy").tolist()

    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            await cluster.start_expert("expert-1", range(16))
            await cluster.push({"expert-0": "prefill", "expert-1": "decode"})
            before = [cluster.metric(f"expert-{i}", "rows_total", phase=PHASES[1 - i]) for i in range(2)]
            assert await cluster.generate(golden.prompt, max_tokens=16) == greedy
            after = [cluster.metric(f"expert-{i}", "rows_total", phase=PHASES[1 - i]) for i in range(2)]
            assert after == before, "each computes the rows of its own phase only"
            assert all(cluster.metric(f"expert-{i}", "rows_total", phase=PHASES[i]) > 0 for i in range(2))
            await cluster.experts.pop("expert-1").server.stop(grace_s=0)
            assert await cluster.generate(golden.prompt, max_tokens=16) == greedy
            assert cluster.metric("expert-0", "rows_total", phase="decode") > 0

    run_test(main())


def test_stop_token_ends_the_stream_with_its_reason() -> None:
    golden = goldens("default")[2]
    greedy = golden.tensor("greedy").tolist()

    async def main() -> None:
        async with open_cluster() as cluster:
            tokens = await cluster.generate(golden.prompt, max_tokens=16, stop_token_ids=[greedy[4]])
            assert tokens == greedy[: greedy.index(greedy[4]) + 1]
            assert await ends_at_once(cluster, golden, greedy[0]) == [greedy[0]]

    run_test(main())


async def ends_at_once(cluster: Cluster, golden: Golden, stop: int) -> list[int]:
    """The very first token, made by the prefill worker, ends the text."""
    return await cluster.generate(golden.prompt, max_tokens=16, stop_token_ids=[stop])
