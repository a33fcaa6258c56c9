"""Rates and profiles of tokens that come at known moments."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from cluster.bench import streams
from cluster.bench.streams import (
    Ask,
    Moments,
    Rate,
    decode_profile,
    decode_rates,
    prefill_profile,
    prefill_rates,
    random_prompts,
)
from model.profile import PARTS, StepClock
from wire.errors import ConfigError, WorkerLost

PROMPTS = [[3], [4]]
BEHIND = [[0.0, 1.0, 2.0, 3.0], [1.1, 2.1, 3.1, 4.1]]
"""A token a second each; the second prompt begins a step later, and its tokens come second in a step."""


class Time:
    """A clock that only the tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def after(self, seconds: float) -> float:
        self.now_s += seconds
        return self.now_s


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def answering(*answers: Moments) -> Ask:
    """Gives these moments, one list a call."""
    left = list(answers)
    return lambda *_: left.pop(0)


def _prefill_rate(ask: Ask, prompts: Sequence[Sequence[int]]) -> Rate:
    """Of one place."""
    return prefill_rates([ask], prompts)[0]


def _decode_rate(ask: Ask, prompts: Sequence[Sequence[int]], *, num_tokens: int, repeats: int) -> Rate:
    """Of one place."""
    return decode_rates([ask], prompts, num_tokens=num_tokens, repeats=repeats)[0]


def test_random_prompts_are_those_of_the_seed() -> None:
    prompts = random_prompts(3, num_tokens=50, vocab_size=10, seed=1)
    assert prompts == random_prompts(3, num_tokens=50, vocab_size=10, seed=1)
    assert prompts != random_prompts(3, num_tokens=50, vocab_size=10, seed=2)
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]


def test_random_prompts_leave_out_special_ids() -> None:
    ids = {
        token_id for prompt in random_prompts(2, num_tokens=200, vocab_size=6, seed=0) for token_id in prompt
    }
    assert ids == {3, 4, 5}


def test_prefill_rate_is_of_all_prompts_but_the_first(time: Time) -> None:
    seconds = [50.0, 2.0, 1.0, 4.0]
    asked: list[tuple[int, int]] = []

    def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
        asked.append((len(prompts), num_tokens))
        return [[time.after(seconds[len(asked) - 1])]]

    rate = _prefill_rate(ask, [[7] * 8] * 4)
    assert rate == Rate(median=4.0, lowest=2.0, highest=8.0)
    assert asked == [(1, 1)] * 4


def test_places_take_turns_and_begin_in_turns(time: Time) -> None:
    asked: list[str] = []

    def place(name: str, seconds: float) -> Ask:
        def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
            asked.append(f"{name}{len(prompts[0])}")
            return [[time.after(seconds), time.after(seconds)][:num_tokens]]

        return ask

    places = [place("a", 2.0), place("b", 4.0)]
    rates = prefill_rates(places, [[7] * 8, [7] * 16, [7] * 24])
    assert asked == ["a8", "b8", "b16", "a16", "a24", "b24"]
    assert [rate.median for rate in rates] == [10.0, 5.0]
    asked.clear()
    rates = decode_rates(places, [[7]], num_tokens=2, repeats=2)
    assert asked == ["a1", "b1", "b1", "a1"]
    assert [rate.median for rate in rates] == [0.5, 0.25]


def test_prefill_rate_of_one_prompt_is_its_own(time: Time) -> None:
    rate = _prefill_rate(lambda *_: [[time.after(2.0)]], [[7] * 8])
    assert rate == Rate(median=4.0, lowest=4.0, highest=4.0)


def test_prefill_rate_passes_on_what_failed(time: Time) -> None:
    def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
        raise WorkerLost("gone")

    with pytest.raises(WorkerLost, match="gone"):
        _prefill_rate(ask, [[7]])


def test_decode_rate_of_one_prompt_leaves_out_its_prefill() -> None:
    rate = _decode_rate(answering([[5.0, 5.5, 6.0]]), [[3]], num_tokens=3, repeats=1)
    assert rate == Rate(median=2.0, lowest=2.0, highest=2.0)


def test_decode_rate_adds_up_prompts_whose_tokens_come_one_behind_another() -> None:
    rate = _decode_rate(answering(BEHIND), PROMPTS, num_tokens=4, repeats=1)
    assert rate.median == pytest.approx(2.0)


def test_decode_rate_counts_only_while_all_decode() -> None:
    """Alone, the first prompt decodes ten times as fast, and so does the second one at the end."""
    first = [0.0, 0.1, 0.2, 1.2, 2.2, 3.2]
    second = [1.2, 2.2, 3.2, 3.3, 3.4, 3.5]
    rate = _decode_rate(answering([first, second]), PROMPTS, num_tokens=6, repeats=1)
    assert rate.median == pytest.approx(2.0)


def test_decode_rate_counts_tokens_that_come_together_after_the_first_moment() -> None:
    rate = _decode_rate(answering([[0.0, 0.0, 1.0, 2.0, 2.0]]), [[3]], num_tokens=5, repeats=1)
    assert rate.median == pytest.approx(1.5)


def test_decode_rate_is_the_median_of_the_repeats() -> None:
    ask = answering([[0.0, 1.0]], [[0.0, 0.25]], [[0.0, 0.5]])
    assert _decode_rate(ask, [[3]], num_tokens=2, repeats=3) == Rate(median=2.0, lowest=1.0, highest=4.0)


@pytest.mark.parametrize(
    "moments",
    [
        [[0.0, 1.0], [5.0, 6.0]],  # the first is over before the second begins
        [[0.0, 1.0], [0.9, 1.9]],  # each has one token while both decode
        [[0.0, 0.0], [0.0, 1.0]],  # no time passes
    ],
)
def test_decode_rate_refuses_prompts_that_never_decode_together(moments: Moments) -> None:
    with pytest.raises(ConfigError, match=r"'--new-tokens'.*got 2") as refused:
        _decode_rate(answering(moments), PROMPTS, num_tokens=2, repeats=1)
    assert refused.value.field == "--new-tokens"


def test_prefill_profile_is_of_the_whole_prompt(time: Time) -> None:
    clock = StepClock()
    clock.seconds["gate"] = 50.0
    clock.mark(1.0)

    def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
        clock.seconds["gate"] += 0.5
        clock.seconds["experts"] += 1.0
        clock.mark(time.after(2.0))
        return [[time.now_s]]

    profile = prefill_profile(ask, [7] * 8, clock)
    assert profile == dict.fromkeys(PARTS, 0.0) | {"gate": 500.0, "experts": 1000.0, "python": 500.0}


def test_decode_profile_is_of_the_steps_in_which_all_decode() -> None:
    """Steps end at the first prompt's tokens; the one before 2.0 is the first with both prompts in it."""
    clock = StepClock()

    def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
        for now_s, attention_s in ((0.0, 9.0), (1.0, 9.0), (2.0, 0.25), (3.0, 0.75)):
            clock.seconds["attention"] += attention_s
            clock.mark(now_s)
        return [BEHIND[0], [0.5, 1.1, 2.1, 3.1]]

    profile = decode_profile(ask, PROMPTS, clock, num_tokens=4)
    assert profile == dict.fromkeys(PARTS, 0.0) | {"attention": 500.0, "python": 500.0}


def test_decode_profile_refuses_prompts_that_never_decode_together() -> None:
    clock = StepClock()

    def ask(prompts: Sequence[Sequence[int]], num_tokens: int) -> Moments:
        clock.mark(0.0)
        clock.mark(1.0)
        return [[0.0, 1.0], [0.1, 1.1]]

    with pytest.raises(ConfigError, match=r"'--new-tokens'.*got 2"):
        decode_profile(ask, PROMPTS, clock, num_tokens=2)
