"""Figures of a load, from outcomes that were written by hand."""

import json

import pytest

from cluster.bench.load.report import depth, make_report, running_steps, spread_ms, waiting_steps
from cluster.bench.load.types import Objectives, Outcome

QUICK = Outcome(
    due_s=0.0,
    sent_s=0.0,
    ended_s=0.4,
    token_s=(0.1, 0.2, 0.4),
    num_prompt_tokens=30,
    num_cached_tokens=10,
)
SLOW = Outcome(due_s=1.0, sent_s=1.2, ended_s=4.0, token_s=(2.0, 4.0), num_prompt_tokens=10)
REFUSED = Outcome(
    due_s=1.0, sent_s=1.0, ended_s=1.05, is_refused=True, retry_after_s=0.5, error="Overloaded: full"
)
BROKEN = Outcome(due_s=2.0, sent_s=2.0, ended_s=3.0, token_s=(2.5,), error="WorkerLost: gone")
ALL = (QUICK, SLOW, REFUSED, BROKEN)


def test_requests_are_counted_by_what_became_of_them() -> None:
    report = make_report(ALL, objectives=Objectives())
    assert (report.num_requests, report.num_done, report.num_refused, report.num_failed) == (4, 2, 1, 1)
    assert report.errors == {"Overloaded: full": 1, "WorkerLost: gone": 1}


def test_latencies_count_from_when_a_request_was_due() -> None:
    report = make_report(ALL, objectives=Objectives())
    assert report.ttft_ms.mean == pytest.approx((100 + 1000) / 2)
    assert report.answer_ms.highest == pytest.approx(3000)
    assert report.refusal_ms.p99 == pytest.approx(50)
    assert report.retry_after_ms.p50 == 500
    assert report.late_ms.highest == pytest.approx(200)
    assert report.itl_ms.mean == pytest.approx((100 + 200 + 2000) / 3)


def test_rates_are_over_the_time_until_the_last_end() -> None:
    report = make_report(ALL, objectives=Objectives())
    assert report.duration_s == 4.0
    assert report.requests_per_s == 2 / 4
    assert report.new_tokens_per_s == 6 / 4
    assert report.prompt_tokens_per_s == 40 / 4


@pytest.mark.parametrize(
    ("ttft_ms", "itl_ms", "num_good"),
    [(0, 0, 2), (999, 0, 1), (1001, 0, 2), (0, 149, 0), (0, 151, 1), (1001, 2001, 2), (99, 2001, 0)],
)
def test_good_answers_keep_both_objectives(ttft_ms: float, itl_ms: float, num_good: int) -> None:
    report = make_report(ALL, objectives=Objectives(ttft_ms=ttft_ms, itl_ms=itl_ms))
    assert report.good_share == num_good / 4
    assert report.good_requests_per_s == num_good / 4.0


def test_cache_hits_are_a_share_of_the_answered_prompts() -> None:
    report = make_report(ALL, objectives=Objectives())
    assert (report.num_cached_tokens, report.cached_share) == (10, 10 / 40)


def test_waiting_and_running_requests_are_followed_over_time() -> None:
    assert waiting_steps([QUICK, REFUSED]) == [(0.0, 1), (0.1, 0), (1.0, 1), (1.05, 0)]
    assert running_steps([SLOW, BROKEN]) == [(2.0, 1), (2.5, 2), (3.0, 1), (4.0, 0)]
    found = depth(running_steps([SLOW, BROKEN]), 4.0)
    assert (found.mean, found.highest) == ((0.5 * 1 + 0.5 * 2 + 1.0 * 1) / 4, 2)


def test_percentiles_are_values_that_occurred() -> None:
    found = spread_ms(i / 1e3 for i in range(100, 0, -1))
    assert [round(value, 9) for value in (found.p50, found.p90, found.p99, found.highest)] == [
        50,
        90,
        99,
        100,
    ]
    assert spread_ms([0.004]).p50 == spread_ms([0.004]).p99 == 4.0


def test_a_single_token_has_no_gap() -> None:
    one = Outcome(due_s=0, sent_s=0, ended_s=1, token_s=(1.0,))
    assert one.mean_gap_s == 0
    assert Objectives(itl_ms=1).are_met(one)
    assert make_report([one], objectives=Objectives()).itl_ms.highest == 0


def test_nothing_at_all_is_reported_too() -> None:
    report = make_report([], objectives=Objectives())
    assert (report.num_requests, report.requests_per_s, report.good_share) == (0, 0, 0)


def test_everything_goes_into_json() -> None:
    found = json.loads(json.dumps(make_report(ALL, objectives=Objectives(ttft_ms=5)).to_json()))
    assert found["ttft_ms"].keys() == {"mean", "p50", "p90", "p99", "highest"}
    assert found["objectives"] == {"ttft_ms": 5, "itl_ms": 0}
    assert (found["waiting"]["highest"], found["running"]["highest"]) == (1, 2)
