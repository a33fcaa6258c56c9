"""The parts of a plan: their worked examples, and what each promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.another import best_replica
from cluster.balance.exchange import best_exchange
from cluster.balance.fill import fill_slots
from cluster.balance.instead import best_instead
from cluster.balance.measure import balance_of, count_moves, count_replicas, worker_loads
from cluster.balance.refine import refine
from cluster.balance.replicas import needed_replicas, plan_replicas
from cluster.balance.shares import LEAST_OF_EVEN, plan_shares
from cluster.balance.spare import make_room
from cluster.balance.state import Copies
from cluster.balance.twins import mark_twins, part_twins
from cluster.balance.types import EMPTY, Fleet, Floats, Ints
from cluster.balance.view import View, look_at


def fleet_of(num_workers: int, num_slots: int) -> Fleet:
    return Fleet(num_slots=num_slots, domain_W=np.arange(num_workers))


def view_of(loads_LE: Floats, plan_LWX: Ints, target: float) -> tuple[View, Copies, Ints]:
    """The view of a plan's layers, and what searches besides need."""
    num_experts = loads_LE.shape[1]
    count_LE = count_replicas(plan_LWX, num_experts)
    copies = Copies.of(plan_LWX, fleet_of(*plan_LWX.shape[1:]), num_experts=num_experts)
    layers = np.arange(len(plan_LWX))
    return look_at(loads_LE, plan_LWX, count_LE, layers, np.full(len(plan_LWX), target)), copies, count_LE


def test_measure_example() -> None:
    plan_LWX, loads_LE = np.array([[[0, EMPTY], [0, 1]]]), np.array([[6.0, 2]])
    assert worker_loads(loads_LE, plan_LWX).tolist() == [[3, 5]]
    assert balance_of(worker_loads(loads_LE, plan_LWX)).tolist() == [0.8]
    assert balance_of(np.zeros((1, 2))).tolist() == [1.0]


def test_moves_are_copies_that_a_worker_lacks() -> None:
    old = np.array([[[0, 1], [2, 3]]])
    assert count_moves(old, np.array([[[1, 0], [2, 3]]]), 4) == 0
    assert count_moves(old, np.array([[[2, 0], [1, 3]]]), 4) == 2
    assert count_moves(old, np.array([[[0, 0], [2, 3]]]), 4) == 1


def test_replicas_example() -> None:
    loads_LE = np.array([[9.0, 4, 2]])
    assert plan_replicas(loads_LE, 6, most=3).tolist() == [[3, 2, 1]]
    assert needed_replicas(loads_LE, np.array([3.0])).tolist() == [[3, 2, 1]]


def test_replicas_are_no_more_than_workers() -> None:
    assert plan_replicas(np.array([[90.0, 1, 1]]), 7, most=3).tolist() == [[3, 2, 2]]
    assert plan_replicas(np.array([[90.0, 1]]), 9, most=3).tolist() == [[3, 3]]


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=5), st.integers(0, 4))
def test_no_other_counts_have_a_lighter_heaviest_replica(loads: list[int], num_spare: int) -> None:
    loads_LE = np.array([loads], dtype=np.float64)
    count_LE = plan_replicas(loads_LE, len(loads) + num_spare, most=9)
    heaviest = (loads_LE / count_LE).max(axis=1)
    assert count_LE.sum() == len(loads) + num_spare
    # With any lighter limit the replicas needed do not fit.
    assert needed_replicas(loads_LE, heaviest * (1 - 1e-6)).sum() > len(loads) + num_spare


def test_fill_example() -> None:
    loads_LE = np.array([[6.0, 4, 3, 1]])
    plan_LWX = fill_slots(
        loads_LE, np.full((1, 2, 2), EMPTY), np.ones((1, 4), dtype=np.int64), fleet_of(2, 2)
    )
    assert plan_LWX.tolist() == [[[0, 3], [1, 2]]]


def test_room_example() -> None:
    loads_LE, plan_LWX = np.array([[8.0, 2, 2]]), np.array([[[0], [0], [1], [1]]])
    room_LWX, count_LE = make_room(loads_LE, plan_LWX, np.ones((1, 3), dtype=np.int64))
    assert count_LE.tolist() == [[2, 1, 1]]
    assert sorted(room_LWX.ravel().tolist()) == [EMPTY, 0, 0, 1]


def test_twins_are_exchanged_for_what_is_near_in_load() -> None:
    plan_LWX = np.array([[[0, 0], [1, 2]]])
    assert mark_twins(plan_LWX).tolist() == [[[False, True], [False, False]]]
    parted = part_twins(np.array([[5.0, 4, 1]]), plan_LWX)
    assert parted.tolist() == [[[0, 1], [0, 2]]]


def test_twin_without_an_exchange_makes_way_for_another_expert() -> None:
    parted = part_twins(np.array([[5.0, 4, 9]]), np.array([[[0, 0], [0, 1]]]))
    assert not mark_twins(parted).any()


def test_exchange_example() -> None:
    plan_LWX, loads_LE = np.array([[[0, 1], [2, 3]]]), np.array([[3.0, 3, 2, 1]])
    view, copies, _ = view_of(loads_LE, plan_LWX, 4.6)
    choice = best_exchange(view, copies)
    assert choice.gain_R[0] == pytest.approx(0.5)


def test_another_replica_example() -> None:
    plan_LWX, loads_LE = np.array([[[0], [1], [1]]]), np.array([[8.0, 2]])
    view, copies, count_LE = view_of(loads_LE, plan_LWX, 4.0)
    choice = best_replica(view, copies, loads_LE, count_LE)
    assert (choice.gain_R.tolist(), choice.slot_R.tolist()) == ([4.0], [0])
    refined = refine(loads_LE, plan_LWX, np.array([4.0]), fleet_of(3, 1))
    assert sorted(worker_loads(loads_LE, refined)[0].tolist()) == [2, 4, 4]


def test_instead_example() -> None:
    plan_LWX, loads_LE = np.array([[[0, 1], [0, 2], [0, 1]]]), np.array([[10.0, 2, 4]])
    view, copies, count_LE = view_of(loads_LE, plan_LWX, 6.0)
    choice, expert_R = best_instead(view, copies, loads_LE, count_LE)
    assert (choice.worker_R.tolist(), choice.slot_R.tolist(), expert_R.tolist()) == ([1], [0], [1])
    assert choice.gain_R[0] == pytest.approx(10 / 3 + 4 - 6)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 9999), num_workers=st.integers(2, 8), num_slots=st.integers(2, 4))
def test_no_step_makes_the_most_loaded_worker_carry_more(seed: int, num_workers: int, num_slots: int) -> None:
    draws = np.random.default_rng(seed)
    num_experts = max(num_workers * num_slots - 3, num_slots + 1)
    loads_LE = draws.lognormal(0, 1, (2, num_experts))
    fleet = fleet_of(num_workers, num_slots)
    count_LE = plan_replicas(loads_LE, num_workers * num_slots, most=num_workers)
    plan_LWX = fill_slots(loads_LE, np.full((2, num_workers, num_slots), EMPTY), count_LE, fleet)
    refined_LWX = refine(loads_LE, plan_LWX, worker_loads(loads_LE, plan_LWX).mean(axis=1), fleet)
    before_L, after_L = (worker_loads(loads_LE, plan).max(axis=1) for plan in (plan_LWX, refined_LWX))
    assert (after_L <= before_L * (1 + 1e-9)).all()
    assert (count_replicas(refined_LWX, num_experts) > 0).all()
    assert not mark_twins(refined_LWX).any()


def test_shares_example() -> None:
    share_LWX = plan_shares(np.array([[6.0, 4]]), np.array([[[0, 1], [0, EMPTY]]]))
    assert share_LWX[0] == pytest.approx(np.array([[1 / 6, 1], [5 / 6, 0]]))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 9999))
def test_shares_sum_to_one_and_no_worker_gets_hotter_than_the_hottest(seed: int) -> None:
    draws = np.random.default_rng(seed)
    loads_LE = draws.lognormal(0, 1.5, (2, 6)) * (draws.random((2, 6)) < 0.9)
    plan_LWX = np.concatenate([np.tile(np.arange(6), (2, 1)), draws.integers(0, 6, (2, 6))], axis=1)
    plan_LWX = plan_LWX.reshape(2, 4, 3)
    share_LWX = plan_shares(loads_LE, plan_LWX)
    layers = np.arange(2)[:, None, None]
    sums_LE = np.zeros((2, 6))
    np.add.at(sums_LE, (layers, plan_LWX), share_LWX)
    assert sums_LE == pytest.approx(np.ones((2, 6)))
    count_LE = count_replicas(plan_LWX, 6)
    assert (share_LWX >= LEAST_OF_EVEN / count_LE[layers, plan_LWX] * (1 - 1e-9)).all()
    shared_L = (share_LWX * loads_LE[layers, plan_LWX]).sum(axis=2).max(axis=1)
    assert (shared_L <= worker_loads(loads_LE, plan_LWX).max(axis=1) * (1 + 1e-9)).all()
