"""Plans of homes: complete, never twice on one worker, level, few moves, replicas apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.homes import plan_homes
from cluster.balance.measure import balance_of, count_moves, count_replicas, worker_loads
from cluster.balance.twins import mark_twins
from cluster.balance.types import EMPTY, Fleet, Floats, Ints


def fleet_of(num_workers: int, num_slots: int, *, num_domains: int | None = None) -> Fleet:
    """Workers in domains of nearly equal size; each its own domain by default."""
    domain_W = np.arange(num_workers) * (num_domains or num_workers) // num_workers
    return Fleet(num_slots=num_slots, domain_W=domain_W)


def drawn(seed: int, num_layers: int = 4, num_experts: int = 24, sigma: float = 1.0) -> Floats:
    return np.random.default_rng(seed).lognormal(0, sigma, (num_layers, num_experts)) * 100


def most_loaded(loads_LE: Floats, plan_LWX: Ints) -> Floats:
    return worker_loads(loads_LE, plan_LWX).max(axis=1)


def check_plan(loads_LE: Floats, plan_LWX: Ints, fleet: Fleet) -> None:
    assert plan_LWX.shape == (len(loads_LE), fleet.num_workers, fleet.num_slots)
    assert (count_replicas(plan_LWX, loads_LE.shape[1]) > 0).all()
    assert not mark_twins(plan_LWX).any()
    assert (plan_LWX != EMPTY).all() or fleet.num_slots > loads_LE.shape[1]


FLEETS = st.integers(1, 9).flatmap(
    lambda num_workers: st.builds(
        fleet_of,
        st.just(num_workers),
        st.integers(-(-8 // num_workers), 9),
        num_domains=st.integers(1, num_workers),
    )
)
LOADS = st.lists(
    st.lists(st.one_of(st.just(0.0), st.floats(0.0, 1e6)), min_size=8, max_size=8), min_size=1, max_size=3
).map(np.array)


@settings(max_examples=150, deadline=None)
@given(loads_LE=LOADS, fleet=FLEETS)
def test_first_plan_holds_every_expert_and_none_twice(loads_LE: Floats, fleet: Fleet) -> None:
    plan_LWX = plan_homes(loads_LE, fleet)
    check_plan(loads_LE, plan_LWX, fleet)
    assert (plan_LWX == plan_homes(loads_LE, fleet)).all()


@settings(max_examples=150, deadline=None)
@given(loads_LE=LOADS, fleet=FLEETS, seed=st.integers(0, 99), lost=st.floats(0, 1))
def test_plan_after_any_other_is_whole_again(loads_LE: Floats, fleet: Fleet, seed: int, lost: float) -> None:
    """The plan before may lack experts, have empty slots and hold twins."""
    draws = np.random.default_rng(seed)
    shape = (len(loads_LE), fleet.num_workers, fleet.num_slots)
    previous_LWX = np.where(draws.random(shape) < lost, EMPTY, draws.integers(0, 8, shape))
    plan_LWX = plan_homes(loads_LE, fleet, previous_LWX=previous_LWX)
    check_plan(loads_LE, plan_LWX, fleet)
    assert (plan_LWX == plan_homes(loads_LE, fleet, previous_LWX=previous_LWX)).all()


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_next_plan_is_as_level_as_one_from_scratch_and_moves_less(num_slots: int) -> None:
    fleet = fleet_of(30 // num_slots, num_slots)
    before, now = drawn(1, num_layers=20), drawn(1, num_layers=20) * drawn(2, num_layers=20, sigma=0.2)
    first = plan_homes(before, fleet)
    scratch, second = plan_homes(now, fleet), plan_homes(now, fleet, previous_LWX=first)
    level_L, next_L = (balance_of(worker_loads(now, plan)) for plan in (scratch, second))
    assert next_L.mean() >= level_L.mean() - 0.02
    assert count_moves(first, second, 24) < count_moves(first, scratch, 24) / 2


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_plans_for_the_same_loads_come_to_rest(seed: int, num_slots: int) -> None:
    loads_LE, fleet = drawn(seed), fleet_of(32 // num_slots, num_slots)
    second = plan_homes(loads_LE, fleet, previous_LWX=plan_homes(drawn(seed + 1), fleet))
    assert (plan_homes(loads_LE, fleet, previous_LWX=second) == second).all()


def test_worked_example() -> None:
    fleet = fleet_of(3, 2)
    first = plan_homes(np.array([[9.0, 4, 2]]), fleet)
    assert count_replicas(first, 3).tolist() == [[3, 2, 1]]
    assert worker_loads(np.array([[9.0, 4, 2]]), first).tolist() == [[5, 5, 5]]
    now_LE = np.array([[9.0, 2, 4]])
    assert sorted(worker_loads(now_LE, first)[0]) == [4, 4, 7]
    second = plan_homes(now_LE, fleet, previous_LWX=first)
    assert worker_loads(now_LE, second).tolist() == [[5, 5, 5]]
    assert count_moves(first, second, 3) == 1


def test_one_slot_a_worker_changes_only_where_an_expert_lacks_replicas() -> None:
    fleet = fleet_of(6, 1)
    first = plan_homes(np.array([[8.0, 4, 2, 2]]), fleet)
    assert count_replicas(first, 4).tolist() == [[3, 1, 1, 1]]
    # Two replicas would do for the first expert, nobody needs the third one's slot.
    second = plan_homes(np.array([[8.0, 4, 2, 3]]), fleet, previous_LWX=first)
    assert (second == first).all()
    third = plan_homes(np.array([[4.0, 9, 2, 2]]), fleet, previous_LWX=first)
    assert count_replicas(third, 4).tolist() == [[1, 3, 1, 1]]
    assert count_moves(first, third, 4) == 2


@pytest.mark.parametrize("num_slots", [1, 3])
def test_replicas_go_to_other_domains(num_slots: int) -> None:
    fleet = fleet_of(12, num_slots, num_domains=4)
    num_experts = 12 * num_slots - 4
    loads_LE = drawn(3, num_experts=num_experts, sigma=0.5)
    plan_LWX = plan_homes(loads_LE, fleet)
    domains = [
        {int(fleet.domain_W[worker]) for worker in np.flatnonzero((plan_LWX[0] == expert).any(axis=1))}
        for expert in range(num_experts)
    ]
    count_E = count_replicas(plan_LWX, num_experts)[0]
    assert count_E.max() > 1
    assert [len(found) for found in domains] == np.minimum(count_E, 4).tolist()


def test_new_workers_take_load_and_others_keep_theirs() -> None:
    loads_LE = drawn(5)
    small = plan_homes(loads_LE, fleet_of(6, 5))
    previous_LWX = np.concatenate([small, np.full((4, 2, 5), EMPTY)], axis=1)
    grown = plan_homes(loads_LE, fleet_of(8, 5), previous_LWX=previous_LWX)
    assert (most_loaded(loads_LE, grown) < most_loaded(loads_LE, small)).all()
    assert count_moves(previous_LWX, grown, 24) < 2 * 4 * 2 * 5


def test_lost_worker_is_replaced_by_the_others() -> None:
    loads_LE = drawn(6)
    plan_LWX = plan_homes(loads_LE, fleet_of(8, 4))
    left_LWX = plan_LWX[:, 1:]
    lacking = int((count_replicas(left_LWX, 24) == 0).sum())
    next_LWX = plan_homes(loads_LE, fleet_of(7, 4), previous_LWX=left_LWX)
    check_plan(loads_LE, next_LWX, fleet_of(7, 4))
    assert lacking <= count_moves(left_LWX, next_LWX, 24) < next_LWX.size / 2


def test_layer_without_load_and_level_layer_are_planned() -> None:
    loads_LE = np.array([[0.0] * 8, [3.0] * 8])
    plan_LWX = plan_homes(loads_LE, fleet_of(4, 3))
    check_plan(loads_LE, plan_LWX, fleet_of(4, 3))
