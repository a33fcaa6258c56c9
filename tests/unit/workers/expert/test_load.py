"""Load counters: every row is counted once, and how even the counts are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.expert.load import LoadCounters, RecentLoad, summarise

NOTHING = {"prefill": {}, "decode": {}}


def test_rows_are_counted_by_layer_and_expert_until_drained() -> None:
    counters = LoadCounters()
    counters.count("decode", 1, np.array([0, 2, 2], np.int32))
    counters.count("decode", 1, np.array([5], np.int32))
    counters.count("decode", 2, np.array([1], np.int32))
    assert {layer: rows.tolist() for layer, rows in counters.drain()["decode"].items()} == {
        1: [1, 0, 2, 0, 0, 1],
        2: [0, 1],
    }
    assert counters.drain() == NOTHING


def test_phases_are_counted_apart() -> None:
    counters = LoadCounters()
    counters.count("decode", 1, np.array([0, 2], np.int32))
    counters.count("prefill", 1, np.array([1], np.int32))
    rows = counters.drain()
    assert rows["decode"][1].tolist() == [1, 0, 1]
    assert rows["prefill"][1].tolist() == [0, 1]


def test_no_rows_count_nothing() -> None:
    counters = LoadCounters()
    counters.count("decode", 1, np.array([], np.int32))
    assert counters.drain() == NOTHING


@given(calls=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6))
def test_counts_are_those_of_all_calls_together(calls: list[list[int]]) -> None:
    counters = LoadCounters()
    for experts in calls:
        counters.count("decode", 3, np.array(experts, np.int64))
    rows = counters.drain()["decode"].get(3, np.zeros(0))
    flat = [expert for experts in calls for expert in experts]
    assert rows.tolist() == np.bincount(flat).tolist() if flat else not rows.size


def test_worked_example_of_the_summary() -> None:
    summary = summarise([6, 2, 0, 0], num_top=3)
    assert summary.balance == pytest.approx(2 / 6)
    assert summary.gini == pytest.approx(0.625)
    assert summary.top_rows == (6, 2, 0)


def test_even_rows_are_balanced_and_no_rows_too() -> None:
    even = summarise([3, 3, 3], num_top=8)
    assert (even.balance, even.gini, even.top_rows) == (1.0, pytest.approx(0.0), (3, 3, 3))
    assert summarise([0, 0], num_top=1).balance == 1.0


@given(rows=st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_gini_is_the_mean_difference_of_all_pairs(rows: list[int]) -> None:
    total = sum(rows)
    if total == 0:
        return
    pairs = sum(abs(a - b) for a in rows for b in rows)
    assert summarise(rows, num_top=1).gini == pytest.approx(pairs / (2 * len(rows) * total))


def test_worked_example_of_fading_rows() -> None:
    recent = RecentLoad(half_life_s=10.0)
    recent.fold({1: np.array([0, 8])}, now_s=0.0)
    recent.fold({1: np.array([0, 1])}, now_s=10.0)
    assert recent.rows_of([(1, 1), (1, 0), (2, 1)]) == [5.0, 0.0, 0.0]


def test_rows_that_have_faded_away_are_forgotten() -> None:
    recent = RecentLoad(half_life_s=1.0)
    recent.fold({1: np.array([8])}, now_s=0.0)
    recent.fold({}, now_s=100.0)
    assert recent.rows_of([(1, 0)]) == [0.0]
