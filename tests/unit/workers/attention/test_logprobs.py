"""Log-probabilities: by the model's own logits, told once, equal whoever computes the prompt."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference_data import LOGIT_TOLERANCE, goldens
from tests.unit.workers.attention.harness import Lab, Listener, make_spec, open_engine
from tests.unit.workers.attention.test_engine_drafts import open_drafting
from tests.unit.workers.attention.test_engine_transfer import prefill, receiver, send
from workers.attention.logprobs import compute_logprobs
from workers.attention.sampler import Turn, choose_token
from workers.attention.types import NewToken, PromptLogprobs, Sampling, TokenLogprobs

INF = math.inf


def test_example_of_the_docstring() -> None:
    got = compute_logprobs(torch.tensor([0.5, 0.25, 0.25]).log(), 2, num_top=2)
    assert got.logprob == pytest.approx(math.log(0.25), abs=1e-7)
    assert [token_id for token_id, _ in got.top] == [0, 1]
    assert [value for _, value in got.top] == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-7)


@given(
    logits=st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12),
    num_top=st.integers(0, 14),
)
def test_best_come_first_and_smaller_ids_first_among_equals(logits: list[float], num_top: int) -> None:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:num_top]
    total = math.log(sum(math.exp(value) for value in logits))
    got = compute_logprobs(torch.tensor(logits), 0, num_top=num_top)
    assert [token_id for token_id, _ in got.top] == order
    assert [value for _, value in got.top] == pytest.approx([logits[i] - total for i in order], abs=1e-6)


def test_impossible_tokens_have_a_number_that_json_can_carry() -> None:
    assert compute_logprobs(torch.tensor([0.0, -INF]), 1, num_top=2) == TokenLogprobs(
        -9999.0, ((0, 0.0), (1, -9999.0))
    )


def test_parameters_change_the_token_and_not_what_is_told() -> None:
    logits_V = torch.tensor([0.5, 0.25, 0.25]).log()
    sampling = Sampling(logit_bias=((2, 50.0),), temperature=0.1, top_k=1, logprobs=1)
    chosen = choose_token(logits_V, Turn(make_spec([1], sampling=sampling), [1]))
    assert chosen.token_id == 2
    assert chosen.logprobs == compute_logprobs(logits_V, 2, num_top=1)


def told(listener: Listener) -> tuple[list[TokenLogprobs], list[TokenLogprobs | None]]:
    """What was told of the prompt, and of the new tokens; the first comes first."""
    if not any(isinstance(event, NewToken) and event.finish for event in listener.events):
        listener.tokens()
    kinds = [type(event) for event in listener.events if isinstance(event, PromptLogprobs | NewToken)]
    assert kinds == sorted(kinds, key=lambda kind: kind is NewToken)
    of_prompt = [row for e in listener.events if isinstance(e, PromptLogprobs) for row in e.rows]
    return of_prompt, [e.logprobs for e in listener.events if isinstance(e, NewToken)]


def ask(lab: Lab, prompt: list[int], **fields: Any) -> tuple[list[TokenLogprobs], list[TokenLogprobs | None]]:
    return told(lab.submit(make_spec(prompt, sampling=Sampling(**fields), max_tokens=4)))


@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_prompts_are_those_of_the_golden_logits(max_step_tokens: int) -> None:
    golden = goldens("default")[2]
    logprobs_TV = golden.tensor("logits").double().log_softmax(-1)
    with open_engine("default", max_step_tokens=max_step_tokens) as lab:
        of_prompt, of_tokens = ask(lab, golden.prompt, prompt_logprobs=2, logprobs=1)
    assert len(of_prompt) == len(golden.prompt) - 1
    limit = 2 * LOGIT_TOLERANCE * golden.logit_std
    for position, row in enumerate(of_prompt):
        expected_V = logprobs_TV[position]
        assert row.logprob == pytest.approx(float(expected_V[golden.prompt[position + 1]]), abs=limit)
        assert [value for _, value in row.top] == pytest.approx(expected_V.topk(2).values.tolist(), abs=limit)
    first = of_tokens[0]
    assert first is not None
    assert first.top[0][1] == first.logprob == pytest.approx(float(logprobs_TV[-1].max()), abs=limit)


def test_cached_prefix_is_computed_again_for_them_and_not_otherwise() -> None:
    prompt = goldens("default")[2].prompt
    with open_engine("default") as lab:
        first = ask(lab, prompt, prompt_logprobs=1, logprobs=1)
        assert ask(lab, prompt, prompt_logprobs=1, logprobs=1) == first
        assert ask(lab, prompt, logprobs=1) == ([], first[1])
        assert ask(lab, prompt) == ([], [None] * 4)


def test_replay_tells_of_the_clients_prompt_alone() -> None:
    prompt = goldens("default")[2].prompt
    with open_engine("default") as lab:
        first, _ = ask(lab, prompt, prompt_logprobs=0)
        replay = make_spec(
            [*prompt, 7, 8], num_prompt_tokens=len(prompt), sampling=Sampling(prompt_logprobs=0)
        )
        assert told(lab.submit(replay))[0] == first


@pytest.mark.parametrize("is_drafting", [False, True], ids=["plain", "drafts"])
def test_received_prompt_is_told_of_like_a_computed_one(is_drafting: bool) -> None:
    """The last row is computed again here, so the prefill worker's first token does not count."""
    golden, sampling = goldens("mtp")[2], Sampling(temperature=1.0, seed=3, logprobs=2)
    given = prefill(golden)
    with open_drafting() if is_drafting else open_engine("mtp") as lab:
        received = receiver(lab, golden, sampling=sampling, max_tokens=12)
        send(lab, received, given.rows())
        lab.engine.finish_transfer(received.spec.key, NewToken(319, None))
        got = received.tokens(), told(received)
        computed = lab.submit(make_spec(golden.prompt, request_id="c", sampling=sampling, max_tokens=12))
        assert (computed.tokens(), told(computed)) == got


def test_preempted_sequences_are_told_of_once_and_the_same() -> None:
    """Three begin in 20 pages of 4 tokens and one ends there: others start again, prompt and all."""
    prompts = [golden.prompt[:21] for golden in goldens("sparse") if len(golden.prompt) >= 21][:3]
    prompts = [[*prompt[i:], *prompt[:i]] for i, prompt in enumerate([prompts[0]] * 4)]
    sampling = Sampling(temperature=1.0, seed=4, logprobs=1, prompt_logprobs=1, frequency_penalty=0.5)

    def ask_all(lab: Lab) -> list[object]:
        lab.door.hold()
        listeners = [
            lab.submit(make_spec(prompt, request_id=str(i), max_tokens=24, sampling=sampling))
            for i, prompt in enumerate(prompts)
        ]
        lab.door.open()
        return [(listener.tokens(), told(listener)) for listener in listeners]

    with open_engine("sparse") as lab:
        alone = ask_all(lab)
    with open_engine("sparse", num_pages=20, lookahead_tokens=1) as lab:
        assert ask_all(lab) == alone
        assert sum(lab.metric("preemptions_total", state=s) for s in ("prefill", "decode")) > 0
