"""The sampler: greedy, reproducible by seed and position, never a dropped token, the right frequencies."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import make_spec
from workers.attention.sampler import Turn, sample_token, sample_tokens
from workers.attention.types import Sampling

GREEDY = Sampling()
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 14),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)


def _kept(logits: list[float], sampling: Sampling) -> set[int]:
    """The plain reference: walk down the sorted probabilities until top_p is reached."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))

    def weight_of(i: int) -> float:
        return math.exp((logits[i] - logits[order[0]]) / sampling.temperature)

    # A whisker of slack: the sampler compares logarithms.
    order = [i for i in order if weight_of(i) >= sampling.min_p * (1 - 1e-9)]
    order = order[: sampling.top_k or len(order)]
    weights = [weight_of(i) for i in order]
    kept, reached = set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        # A whisker of slack: the reference adds in another order.
        if kept and reached >= sampling.top_p + 1e-12:
            break
        kept.add(i)
        reached += weight / sum(weights)
    return kept


@given(logits=LOGITS, position=st.integers(0, 100))
def test_greedy_is_the_first_maximum(logits: list[float], position: int) -> None:
    expected = logits.index(max(logits))
    assert sample_token(torch.tensor(logits), GREEDY, position=position) == expected


@given(logits=LOGITS, sampling=SAMPLINGS, position=st.integers(0, 2**20))
def test_dropped_token_is_never_picked(logits: list[float], sampling: Sampling, position: int) -> None:
    assert sample_token(torch.tensor(logits), sampling, position=position) in _kept(logits, sampling)


@given(logits=LOGITS, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 1000))
@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}], ids=str)
def test_keeping_one_token_is_greedy(
    logits: list[float], seed: int, position: int, fields: dict[str, float]
) -> None:
    sampling = Sampling(temperature=1.0, seed=seed, **fields)
    assert sample_token(torch.tensor(logits), sampling, position=position) == logits.index(max(logits))


def test_seed_and_position_decide_whatever_was_drawn_before() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1))
    first = [sample_token(logits_V, Sampling(temperature=1.0, seed=5), position=i) for i in range(40)]
    torch.manual_seed(3)
    torch.rand(7)
    again = [
        sample_token(logits_V, Sampling(temperature=1.0, seed=5), position=i) for i in reversed(range(40))
    ]
    assert again[::-1] == first
    other = [sample_token(logits_V, Sampling(temperature=1.0, seed=6), position=i) for i in range(40)]
    assert other != first
    assert len(set(first)) > 5


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    sample_token(torch.zeros(9), Sampling(temperature=1.0, seed=5), position=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(seed: int, temperature: float) -> None:
    """3000 draws of fixed seeds: five standard deviations of a count are 5 * sqrt(0.25 / 3000) = 0.046."""
    logits_V = torch.tensor([1.0, 0.0, -1.0, 0.5, -5.0])
    sampling = Sampling(temperature=temperature, seed=seed)
    counts = Counter(sample_token(logits_V, sampling, position=i) for i in range(3000))
    got = [counts[i] / 3000 for i in range(5)]
    assert got == pytest.approx((logits_V / temperature).softmax(-1).tolist(), abs=0.046)


def test_positions_and_seeds_are_independent() -> None:
    """Neighbours agree as often as chance says: 1/4 of 3000, within five standard deviations (0.04)."""
    logits_V = torch.zeros(4)
    one, two = (Sampling(temperature=1.0, seed=seed) for seed in (7, 8))
    first = [sample_token(logits_V, one, position=i) for i in range(3001)]
    second = [sample_token(logits_V, two, position=i) for i in range(3001)]
    assert sum(a == b for a, b in itertools.pairwise(first)) / 3000 == pytest.approx(0.25, abs=0.04)
    assert sum(a == b for a, b in zip(first, second, strict=True)) / 3001 == pytest.approx(0.25, abs=0.04)
    # Nor is the next seed the same sequence, one position on.
    shifted = zip(first[1:], second, strict=False)
    assert sum(a == b for a, b in shifted) / 3000 == pytest.approx(0.25, abs=0.04)


def test_top_p_renormalises_what_it_keeps() -> None:
    """Probabilities 0.5, 0.3, 0.2 and top_p 0.8: the third is gone, the others are 5/8 and 3/8."""
    logits_V = torch.tensor([0.5, 0.3, 0.2]).log()
    sampling = Sampling(temperature=1.0, top_p=0.8 - 1e-6, seed=3)
    counts = Counter(sample_token(logits_V, sampling, position=i) for i in range(3000))
    assert counts[2] == 0
    assert counts[0] / 3000 == pytest.approx(0.625, abs=0.046)


def test_min_p_is_a_share_of_the_most_probable_token() -> None:
    """Probabilities 0.5, 0.3, 0.12, 0.08 and min_p 0.2: what is under 0.1 is dropped, the rest drawn from."""
    logits_V = torch.tensor([0.5, 0.3, 0.12, 0.08]).log()
    sampling = Sampling(temperature=1.0, min_p=0.2, seed=3)
    counts = Counter(sample_token(logits_V, sampling, position=i) for i in range(3000))
    assert counts[3] == 0
    assert counts[0] / 3000 == pytest.approx(0.5 / 0.92, abs=0.046)


def test_min_p_counts_after_the_temperature() -> None:
    """At temperature 2 the probabilities' roots count: 0.08 / 0.5 becomes 0.4, above the share of 0.2."""
    logits_V = torch.tensor([0.5, 0.3, 0.12, 0.08]).log()
    sampling = Sampling(temperature=2.0, min_p=0.2, seed=3)
    assert {sample_token(logits_V, sampling, position=i) for i in range(200)} == {0, 1, 2, 3}


def test_top_p_that_is_reached_exactly_needs_no_further_token() -> None:
    """Two halves and top_p 0.5: the first half is the smallest set that reaches it."""
    sampling = Sampling(temperature=1.0, top_p=0.5, seed=3)
    assert {sample_token(torch.zeros(2), sampling, position=i) for i in range(50)} == {0}


def test_first_of_many_equals_is_kept() -> None:
    sampling = Sampling(temperature=1.0, top_k=1, seed=3)
    assert {sample_token(torch.zeros(5000), sampling, position=i) for i in range(5)} == {0}


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (1 - 2**-53, 3)])
def test_draw_at_either_end_picks_a_kept_token(
    monkeypatch: pytest.MonkeyPatch, draw: float, token: int
) -> None:
    monkeypatch.setattr("workers.attention.sampler._uniform", lambda _seed, _position: draw)
    logits_V = torch.tensor([-INF, 0.0, -INF, 0.3, -INF])
    assert sample_token(logits_V, Sampling(temperature=1.0), position=0) == token


INF = float("inf")


@pytest.mark.parametrize(
    ("logits", "allowed"),
    [
        ([-INF, 0.0, -INF, 0.0], {1, 3}),
        ([-INF, -INF, 2.0], {2}),
        ([3e38, -3e38, 3e38], {0, 2}),
        ([-3e38, -3e38, -3e38], {0, 1, 2}),
        ([INF, 0.0, 1.0], {0}),
        ([0.0, INF, INF], {1, 2}),
        ([-INF, -INF, -INF], {0, 1, 2}),
        ([math.nan, math.nan], {0, 1}),
        ([math.nan, 1.0, 0.0], {0, 1, 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1e-45, seed=1),
        Sampling(temperature=1e30, seed=1),
        Sampling(temperature=1.0, top_p=0.5, top_k=2, seed=1),
        Sampling(temperature=1.0, min_p=0.5, seed=1),
    ],
    ids=str,
)
def test_extreme_logits_give_a_token_of_the_vocabulary(
    logits: list[float], allowed: set[int], sampling: Sampling
) -> None:
    """A token outside it would break the next step of everyone in the batch."""
    got = {sample_token(torch.tensor(logits), sampling, position=i) for i in range(20)}
    assert got <= allowed


def test_every_bit_of_a_seed_counts() -> None:
    """Seeds that differ only above bit 32 or only in one position draw other texts."""

    def text(seed: int, first: int = 0) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [sample_token(torch.zeros(1000), sampling, position=first + i) for i in range(20)]

    texts = [text(0), text(1), text(2**32), text(2**63), text(0, first=1)[:-1] + text(0)[:1]]
    assert len({tuple(tokens) for tokens in texts}) == len(texts)


def test_tokens_of_a_batch_are_those_of_each_request_alone() -> None:
    logits_BV = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    samplings = [GREEDY, Sampling(temperature=1.0, seed=5), GREEDY, Sampling(temperature=0.7, seed=9), GREEDY]
    positions = [0, 3, 1, 7, 2]
    alone = [
        sample_token(logits_V, sampling, position=position)
        for logits_V, sampling, position in zip(logits_BV, samplings, positions, strict=True)
    ]
    turns = [
        Turn(make_spec([5, 6], sampling=sampling), [5, 6, *[7] * position])
        for sampling, position in zip(samplings, positions, strict=True)
    ]
    assert [chosen.token_id for chosen in sample_tokens(logits_BV, turns)] == alone
    assert len(set(alone)) > 1
