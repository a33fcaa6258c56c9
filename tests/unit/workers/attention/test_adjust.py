"""Biases and penalties: the numbers of small examples, and a plain reference over drawn ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import make_spec
from workers.attention.adjust import adjust_logits
from workers.attention.sampler import Turn, choose_token, sample_tokens
from workers.attention.types import Sampling

INF = float("inf")
PROMPT = (0, 1)
PENALTIES = st.builds(
    Sampling,
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 7), st.floats(-100, 100)).map(lambda b: tuple(b.items())),
    min_tokens=st.integers(0, 6),
)


def adjusted(logits: list[float], output: Sequence[int] = (), **fields: Any) -> list[float]:
    stop = frozenset(fields.pop("stop", ()))
    spec = make_spec(PROMPT, sampling=Sampling(**fields), stop_token_ids=stop)
    return adjust_logits(torch.tensor(logits), spec, (*PROMPT, *output)).tolist()


def test_repetition_counts_prompt_and_output_once_whatever_the_sign() -> None:
    """Tokens 0, 1 (prompt) and 3 (output, twice) are divided by 2 where positive, doubled where negative."""
    got = adjusted([3.0, -1.0, 3.0, 4.0], output=[3, 3], repetition_penalty=2.0)
    assert got == [1.5, -2.0, 3.0, 2.0]


def test_presence_and_frequency_count_the_output_alone() -> None:
    got = adjusted([1.0, 1.0, 1.0, 1.0], output=[3, 3, 1], presence_penalty=0.5, frequency_penalty=0.25)
    assert got == [1.0, 0.25, 1.0, 0.0]


def test_all_penalties_together_are_those_of_the_docstring() -> None:
    got = adjusted(
        [0.0, 0.0, 0.0, 0.0, 3.0],
        output=[4, 4],
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    assert got[4] == 1.0


def test_bias_is_added_before_the_repetition_penalty() -> None:
    assert adjusted([1.0, 1.0], logit_bias=((1, 2.0),), repetition_penalty=2.0) == [0.5, 1.5]


@pytest.mark.parametrize(("num_output", "is_masked"), [(0, True), (2, True), (3, False)])
def test_end_tokens_are_masked_until_min_tokens(num_output: int, is_masked: bool) -> None:
    got = adjusted([1.0, 9.0, 1.0, 9.0], output=[2] * num_output, min_tokens=3, stop=[1, 3])
    assert got == ([1.0, -INF, 1.0, -INF] if is_masked else [1.0, 9.0, 1.0, 9.0])


def test_bias_does_not_bring_back_a_masked_end_token() -> None:
    assert adjusted([1.0, 9.0], min_tokens=1, stop=[1], logit_bias=((1, 100.0),)) == [1.0, -INF]


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=8, max_size=8),
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 7), max_size=6),
    sampling=PENALTIES,
    stop=st.frozensets(st.integers(0, 7), max_size=3),
)
def test_any_parameters_are_those_of_the_plain_reference(
    logits: list[float], prompt: list[int], output: list[int], sampling: Sampling, stop: frozenset[int]
) -> None:
    expected = list(logits)
    bias, counts = dict(sampling.logit_bias), Counter(output)
    for token_id in range(8):
        value = expected[token_id]
        if len(output) < sampling.min_tokens and token_id in stop:
            value = -INF
        value += bias.get(token_id, 0.0)
        if token_id in {*prompt, *output}:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        value -= sampling.frequency_penalty * counts[token_id]
        value -= sampling.presence_penalty if counts[token_id] else 0.0
        expected[token_id] = value
    spec = make_spec(prompt, sampling=sampling, stop_token_ids=stop)
    logits_V = torch.tensor(logits)
    got = adjust_logits(logits_V, spec, [*prompt, *output]).tolist()
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert logits_V.tolist() == logits


def test_replay_takes_emitted_tokens_for_output() -> None:
    """Attempt 1 has the output in its prompt; num_prompt_tokens says where it begins."""
    sampling = Sampling(presence_penalty=1.0, min_tokens=3)
    first = make_spec(PROMPT, sampling=sampling, stop_token_ids=frozenset({2}))
    replay = make_spec(
        (*PROMPT, 3, 3), sampling=sampling, stop_token_ids=frozenset({2}), num_prompt_tokens=len(PROMPT)
    )
    logits_V = torch.tensor([1.0, 0.5, 9.0, 1.5])
    tokens = (*PROMPT, 3, 3)
    chosen = [choose_token(logits_V, Turn(spec, tokens)).token_id for spec in (first, replay)]
    assert chosen == [0, 0]


def test_drafts_of_earlier_rows_count_as_output() -> None:
    spec = make_spec(PROMPT, sampling=Sampling(temperature=1.0, frequency_penalty=1.0, seed=4))
    logits_V = torch.linspace(0, 1, 50)
    for num_drafts in range(4):
        whole = (*PROMPT, 7, 8, 9)
        split = Turn(spec, whole[: 5 - num_drafts], whole[5 - num_drafts :])
        assert choose_token(logits_V, split) == choose_token(logits_V, Turn(spec, whole))


def test_adjusted_rows_leave_greedy_neighbours_alone() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, 0.0]] * 3)
    biased = Sampling(logit_bias=((0, 5.0),))
    turns = [Turn(make_spec(PROMPT, sampling=s), PROMPT) for s in (Sampling(), biased, Sampling())]
    assert [chosen.token_id for chosen in sample_tokens(logits_BV, turns)] == [1, 0, 1]
