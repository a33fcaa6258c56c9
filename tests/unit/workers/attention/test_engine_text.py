"""The engine's text: that of the goldens, alone and in company, sampled and replayed."""

import random

import pytest
import torch

from tests.reference_data import LOGIT_TOLERANCE, SHAPES, Golden, goldens
from tests.unit.workers.attention.harness import PAGE_TOKENS, make_spec, open_engine
from workers.attention.scoring import ScoreSpec
from workers.attention.types import Finish, Sampling

LENGTHS = (1, 2, PAGE_TOKENS, PAGE_TOKENS + 1, 17, 30, 10 * PAGE_TOKENS + 1, 75)


def mixed_prompts(seed: int = 7) -> list[list[int]]:
    """Eight prompts, from one token to more than ten pages."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("max_step_tokens", [7, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_the_goldens(shape: str, max_step_tokens: int) -> None:
    cases = goldens(shape)
    expected = [golden.tensor("greedy").tolist() for golden in cases]
    with open_engine(shape, max_step_tokens=max_step_tokens) as lab:
        together = [
            lab.submit(make_spec(golden.prompt, request_id=str(golden), max_tokens=len(ids)))
            for golden, ids in zip(cases, expected, strict=True)
        ]
        assert [listener.tokens() for listener in together] == expected
        assert {listener.finish() for listener in together} == {Finish.LENGTH}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=11)], ids=["greedy", "seed"])
@pytest.mark.parametrize("max_step_tokens", [5, 64])
def test_eight_mixed_prompts_at_once_equal_each_alone(max_step_tokens: int, sampling: Sampling) -> None:
    prompts = mixed_prompts()
    with open_engine("sparse") as lab:
        alone = [lab.run(prompt, max_tokens=10, sampling=sampling) for prompt in prompts]
    with open_engine("sparse", max_step_tokens=max_step_tokens, max_batch_requests=5) as lab:
        lab.door.hold()
        together = [
            lab.submit(make_spec(prompt, request_id=str(i), max_tokens=10, sampling=sampling))
            for i, prompt in enumerate(prompts)
        ]
        lab.door.open()
        assert [listener.tokens() for listener in together] == alone


@pytest.mark.parametrize("max_step_tokens", [5, 64])
def test_micro_batches_change_no_token(max_step_tokens: int) -> None:
    prompts = mixed_prompts()
    with open_engine("sparse") as lab:
        alone = [lab.run(prompt, max_tokens=10) for prompt in prompts]
    with open_engine("sparse", max_step_tokens=max_step_tokens, micro_batches=2) as lab:
        lab.door.hold()
        together = [
            lab.submit(make_spec(prompt, request_id=str(i), max_tokens=10))
            for i, prompt in enumerate(prompts)
        ]
        lab.door.open()
        assert [listener.tokens() for listener in together] == alone


def test_other_seeds_and_positions_give_other_text() -> None:
    prompt = mixed_prompts()[4]
    with open_engine("default") as lab:
        texts = [
            tuple(lab.run(prompt, sampling=Sampling(temperature=1.5, seed=seed), **fields))
            for seed, fields in [(1, {}), (2, {}), (1, {"num_prompt_tokens": 10}), (1, {})]
        ]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("num_before", [1, 5, 9])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.2, top_p=0.95, top_k=40, seed=2**63),
        Sampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.5),
    ],
    ids=["greedy", "seed", "penalties"],
)
def test_replay_goes_on_where_the_text_stopped(num_before: int, sampling: Sampling) -> None:
    """Attempt 1 gets the prompt and the first tokens as its prompt; positions count behind the client's."""
    prompt = mixed_prompts()[6]
    with open_engine("default") as lab:
        whole = lab.run(prompt, max_tokens=10, sampling=sampling)
        replay = make_spec(
            [*prompt, *whole[:num_before]],
            attempt=1,
            max_tokens=10 - num_before,
            num_prompt_tokens=len(prompt),
            sampling=sampling,
        )
        assert whole[:num_before] + lab.submit(replay).tokens() == whole


def test_stop_token_ends_the_text_and_is_told() -> None:
    golden = goldens("default")[2]
    greedy = golden.tensor("greedy").tolist()
    stop = greedy[5]
    with open_engine("default") as lab:
        listener = lab.submit(make_spec(golden.prompt, max_tokens=16, stop_token_ids=frozenset({stop, 319})))
        assert listener.tokens() == greedy[: greedy.index(stop) + 1]
        assert listener.finish() is Finish.STOP


def test_end_token_waits_for_min_tokens() -> None:
    """The stop token would be sixth; masked for eight tokens, another text follows and may end later."""
    golden = goldens("default")[2]
    stop = frozenset({golden.tensor("greedy").tolist()[5]})
    with open_engine("default") as lab:
        tokens = lab.run(golden.prompt, max_tokens=12, stop_token_ids=stop, sampling=Sampling(min_tokens=8))
        assert len(tokens) >= 8
        assert not stop & set(tokens[:8])


def test_first_token_may_be_the_last() -> None:
    golden = goldens("mtp")[1]
    with open_engine("mtp") as lab:
        assert lab.run(golden.prompt, max_tokens=1) == golden.tensor("greedy").tolist()[:1]


@pytest.mark.parametrize("chunk_tokens", [1, 13, 512])
@pytest.mark.parametrize("golden", goldens("sparse", "mtp"), ids=str)
def test_scores_while_others_decode_are_those_of_the_golden(golden: Golden, chunk_tokens: int) -> None:
    spread = golden.logit_std
    with open_engine(golden.shape) as lab:
        lab.door.hold()
        other = lab.submit(make_spec(range(3, 24), max_tokens=6))
        lab.door.step(2)
        other.token()
        scoring = lab.engine.score(ScoreSpec(token_ids=golden.prompt, chunk_tokens=chunk_tokens))
        lab.door.open()
        tensors = scoring.result(timeout=30)
        assert len(other.tokens()) == 6
    assert (tensors["logits"] - golden.tensor("logits")).abs().max() <= LOGIT_TOLERANCE * spread
    moe_layers = [layer for layer in range(8) if golden.has(f"router_ids.{layer}")]
    wanted = torch.stack([golden.tensor(f"router_ids.{layer}").int() for layer in moe_layers])
    assert torch.equal(tensors["expert_ids"], wanted)
    weights = torch.stack([golden.tensor(f"router_weights.{layer}") for layer in moe_layers])
    torch.testing.assert_close(tensors["expert_weights"], weights, rtol=1e-5, atol=1e-5)
    assert tensors["indexer_ids"].shape[1] == len(golden.prompt)
    if golden.has("mtp.logits"):
        deviation = (tensors["mtp_logits"] - golden.tensor("mtp.logits")).abs().max()
        assert deviation <= LOGIT_TOLERANCE * spread


def test_score_puts_the_newest_table_in_force_for_every_chunk() -> None:
    """60 tokens in chunks of 13: five steps of the main layers, five of the MTP layer."""
    golden = goldens("mtp")[2]
    with open_engine("mtp") as lab:
        lab.engine.score(ScoreSpec(token_ids=golden.prompt, chunk_tokens=13)).result(timeout=30)
        assert lab.door.num_arrivals == 10


def test_score_leaves_the_text_of_others_alone() -> None:
    golden = goldens("default")[1]
    with open_engine("default") as lab:
        lab.door.hold()
        listener = lab.submit(make_spec(golden.prompt, max_tokens=16))
        scores = [lab.engine.score(ScoreSpec(token_ids=(5,) * 9, chunk_tokens=4)) for _ in range(3)]
        lab.door.open()
        assert listener.tokens() == golden.tensor("greedy").tolist()
        assert len({tuple(score.result(30)["logits"].flatten().tolist()) for score in scores}) == 1
