"""Row counts fade with time; phases stay apart."""

import numpy as np
import pytest

from cluster.balance.window import LoadWindow

WINDOW = LoadWindow(half_life_s=10.0)


def test_worked_example() -> None:
    window = WINDOW.fold("decode", {3: np.array([100.0, 0.0])}, now_s=0.0)
    assert window.loads(now_s=10.0)[3].tolist() == [50.0, 0.0]
    window = window.fold("decode", {3: np.array([30.0, 0.0])}, now_s=10.0)
    assert window.loads(now_s=10.0)[3].tolist() == [80.0, 0.0]
    assert window.loads(now_s=20.0)[3].tolist() == [40.0, 0.0]
    assert window.num_rows(now_s=20.0) == 40.0


def test_phases_are_apart_and_add_up() -> None:
    window = WINDOW.fold("prefill", {3: np.array([8.0, 0.0])}, now_s=1.0)
    window = window.fold("decode", {3: np.array([0.0, 2.0]), 4: np.array([1.0, 1.0])}, now_s=1.0)
    assert window.loads("prefill", now_s=1.0)[3].tolist() == [8.0, 0.0]
    assert window.loads("decode", now_s=1.0)[3].tolist() == [0.0, 2.0]
    assert {layer: rows.tolist() for layer, rows in window.loads(now_s=1.0).items()} == {
        3: [8.0, 2.0],
        4: [1.0, 1.0],
    }


def test_fold_of_one_phase_decays_the_other() -> None:
    window = WINDOW.fold("prefill", {3: np.array([8.0])}, now_s=0.0)
    window = window.fold("decode", {3: np.array([1.0])}, now_s=10.0)
    assert window.loads("prefill", now_s=10.0)[3].tolist() == [4.0]


def test_fold_leaves_the_window_before_it_as_it_was() -> None:
    before = WINDOW.fold("decode", {3: np.array([8.0])}, now_s=0.0)
    before.fold("decode", {3: np.array([8.0])}, now_s=0.0)
    assert before.loads(now_s=0.0)[3].tolist() == [8.0]
    assert WINDOW.loads(now_s=0.0) == {}


def test_a_clock_that_goes_back_does_not_make_counts_grow() -> None:
    window = WINDOW.fold("decode", {3: np.array([8.0])}, now_s=100.0)
    assert window.loads(now_s=50.0)[3].tolist() == [8.0]
    assert window.fold("decode", {3: np.array([2.0])}, now_s=50.0).loads(now_s=110.0)[3] == pytest.approx(5.0)
