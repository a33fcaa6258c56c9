"""Groups stay on one node, through re-plans too; hot nodes get as level as they can."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.grouped import Nodes, plan_grouped
from cluster.balance.groups import exchange_groups, match_groups, node_loads, plan_groups
from cluster.balance.measure import balance_of, count_moves, count_replicas, worker_loads
from cluster.balance.twins import mark_twins
from cluster.balance.types import EMPTY, Floats, Ints

NODES = Nodes(num_nodes=2, num_workers=6, num_slots=4, num_groups=4)
NUM_EXPERTS = 16


def drawn(seed: int, sigma: float = 1.0) -> Floats:
    return np.random.default_rng(seed).lognormal(0, sigma, (3, NUM_EXPERTS)) * 100


def check_grouped(plan_LWX: Ints, nodes: Nodes = NODES) -> None:
    assert (count_replicas(plan_LWX, NUM_EXPERTS) > 0).all()
    assert not mark_twins(plan_LWX).any()
    by_node = plan_LWX.reshape(len(plan_LWX), nodes.num_nodes, -1)
    groups = [
        [set((slots * nodes.num_groups // NUM_EXPERTS).tolist()) for slots in layer] for layer in by_node
    ]
    each = nodes.num_groups // nodes.num_nodes
    assert all([len(found) for found in layer] == [each] * nodes.num_nodes for layer in groups)


def test_worked_example_of_groups() -> None:
    load_LG = np.array([[5.0, 4, 2, 1]])
    node_LG = plan_groups(load_LG, num_nodes=2)
    assert node_LG.tolist() == [[0, 1, 1, 0]]
    assert node_loads(load_LG, node_LG, num_nodes=2).tolist() == [[6, 6]]
    now_LG = np.array([[5.0, 4, 1, 2]])
    next_LG = exchange_groups(now_LG, node_LG, np.array([6.0]), num_nodes=2)
    assert next_LG.tolist() == [[1, 0, 1, 0]]


def test_groups_below_the_limit_stay() -> None:
    node_LG = np.array([[0, 0, 1, 1]])
    assert exchange_groups(np.array([[9.0, 9, 1, 1]]), node_LG, np.array([20.0]), num_nodes=2) is not node_LG
    kept = exchange_groups(np.array([[9.0, 9, 1, 1]]), node_LG, np.array([20.0]), num_nodes=2)
    assert kept.tolist() == node_LG.tolist()


@given(st.integers(0, 999))
def test_matched_groups_fill_every_node(seed: int) -> None:
    overlap_LNG = np.random.default_rng(seed).integers(0, 9, (3, 2, 4))
    node_LG = match_groups(overlap_LNG)
    assert (np.sort(node_LG, axis=1) == [0, 0, 1, 1]).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), lost=st.floats(0, 1))
def test_groups_stay_together_after_any_plan(seed: int, lost: float) -> None:
    draws = np.random.default_rng(seed)
    previous_LWX = np.where(draws.random((3, 6, 4)) < lost, EMPTY, draws.integers(0, NUM_EXPERTS, (3, 6, 4)))
    check_grouped(plan_grouped(drawn(seed), NODES))
    check_grouped(plan_grouped(drawn(seed), NODES, previous_LWX=previous_LWX))


@pytest.mark.parametrize("seed", range(4))
def test_next_plan_is_as_level_as_one_from_scratch_and_moves_less(seed: int) -> None:
    first = plan_grouped(drawn(seed), NODES)
    now_LE = drawn(seed) * drawn(seed + 50, sigma=0.2)
    scratch, second = plan_grouped(now_LE, NODES), plan_grouped(now_LE, NODES, previous_LWX=first)
    assert (
        balance_of(worker_loads(now_LE, second)).mean()
        >= balance_of(worker_loads(now_LE, scratch)).mean() - 0.02
    )
    assert count_moves(first, second, NUM_EXPERTS) <= count_moves(first, scratch, NUM_EXPERTS) / 2


def test_plans_for_the_same_loads_come_to_rest() -> None:
    second = plan_grouped(drawn(1), NODES, previous_LWX=plan_grouped(drawn(2), NODES))
    assert (plan_grouped(drawn(1), NODES, previous_LWX=second) == second).all()


def test_one_group_a_node_stays_where_it_is() -> None:
    nodes = Nodes(num_nodes=4, num_workers=8, num_slots=3, num_groups=4)
    first = plan_grouped(drawn(2), nodes)
    second = plan_grouped(drawn(3), nodes, previous_LWX=first)
    check_grouped(second, nodes)
    assert (
        np.sort(first.reshape(3, 4, -1) // 4, axis=2) == np.sort(second.reshape(3, 4, -1) // 4, axis=2)
    ).all()
