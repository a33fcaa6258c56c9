"""The dispatch plan: every pair once, each token once per worker, and sums that do not know where."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experts.plan import (
    Assignments,
    DispatchPlan,
    WorkerCall,
    add_partial,
    assignments_of,
    plan_dispatch,
)
from router.experts.replicas import WorkerLoads
from router.experts.table import RoutingTable, build_table
from tests.unit.router.experts.harness import (
    LAYER,
    Choices,
    choices,
    copies,
    loads_of,
    partial_sums,
    plain_combine,
    random_choices,
    tables,
)
from wire.errors import StaleTable

NUM_EXPERTS = 6
TABLES = tables(num_experts=NUM_EXPERTS, version=8)


def _plan(given_choices: Choices, table: RoutingTable) -> DispatchPlan:
    return _plan_pairs(assignments_of(given_choices.ids_TK, given_choices.weights_TK), table)


def _plan_pairs(pairs: Assignments, table: RoutingTable) -> DispatchPlan:
    """Nothing waits anywhere, and all workers are usable."""
    return plan_dispatch(
        pairs, table, layer_idx=LAYER, loads=loads_of(backlog=[0] * max(1, len(table.worker_ids)))
    )


def _combine(given_choices: Choices, plan: DispatchPlan) -> np.ndarray:
    total_TD = np.zeros(given_choices.x_TD.shape)
    for call in plan.calls:
        add_partial(total_TD, call, partial_sums(given_choices.x_TD[call.token_idx_R], call))
    return total_TD.astype(np.float32)


def _multiset(pairs: Assignments) -> Counter[tuple[int, int, float]]:
    arrays = (pairs.token_idx_A, pairs.expert_idx_A, pairs.weight_A)
    return Counter(zip(*(array.tolist() for array in arrays), strict=True))


def test_docstring_example() -> None:
    replicas = [*copies(0, [0], [1]), *copies(1, [0], [1]), *copies(2, [1], [1])]
    table = build_table(version=4, num_experts=3, worker_ids=["w0", "w1"], layers={LAYER: replicas})
    ids_TK = np.array([[0, 1], [1, 2]], dtype=np.int32)
    weights_TK = np.array([[0.1, 0.2], [0.3, 0.4]], dtype=np.float32)
    plan = _plan_pairs(assignments_of(ids_TK, weights_TK), table)
    assert (plan.layer_idx, plan.table_version) == (LAYER, 4)
    first, second = plan.calls
    assert (first.worker_id, first.token_idx_R.tolist()) == ("w0", [0, 1])
    assert list(zip(first.row_idx_A.tolist(), first.expert_idx_A.tolist(), strict=True)) == [
        (0, 0), (0, 1), (1, 1),
    ]  # fmt: skip
    assert (second.worker_id, second.token_idx_R.tolist()) == ("w1", [1])
    assert (second.row_idx_A.tolist(), second.expert_idx_A.tolist()) == ([0], [2])
    assert second.weight_A.tolist() == [np.float32(0.4)]


@given(given_choices=choices())
def test_pairs_are_those_of_the_plain_loop_without_the_empty_choices(given_choices: Choices) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    got = list(zip(pairs.token_idx_A, pairs.expert_idx_A, pairs.weight_A, strict=True))
    assert got == given_choices.pairs()


@given(given_choices=choices(), table=TABLES)
def test_every_pair_travels_exactly_once_with_its_weight(given_choices: Choices, table: RoutingTable) -> None:
    plan = _plan(given_choices, table)
    travelled = sum((_multiset(call.assignments()) for call in plan.calls), Counter())
    assert travelled == Counter((t, e, float(w)) for t, e, w in given_choices.pairs())


@given(given_choices=choices(), table=TABLES)
def test_calls_go_to_different_workers_that_hold_the_experts(
    given_choices: Choices, table: RoutingTable
) -> None:
    plan = _plan(given_choices, table)
    names = [call.worker_id for call in plan.calls]
    assert len(set(names)) == len(names)
    held = {(table.worker_ids[r.worker_idx], r.expert_idx) for r in table.routes(LAYER).replicas}
    assert {(call.worker_id, int(e)) for call in plan.calls for e in call.expert_idx_A} <= held


@given(given_choices=choices(), table=TABLES)
def test_rows_of_a_call_ascend_and_each_is_needed(given_choices: Choices, table: RoutingTable) -> None:
    for call in _plan(given_choices, table).calls:
        rows = call.token_idx_R.tolist()
        assert rows == sorted(set(rows))
        assert sorted(set(call.row_idx_A.tolist())) == list(range(len(rows)))
        assert (call.row_idx_A.dtype, call.expert_idx_A.dtype, call.weight_A.dtype) == (
            np.int32, np.int32, np.float32,
        )  # fmt: skip


@given(given_choices=choices(), table=TABLES)
def test_dispatch_then_combine_equals_the_plain_loop_bit_for_bit(
    given_choices: Choices, table: RoutingTable
) -> None:
    """The plain loop knows no worker: so no number of workers, placement or share changes a bit."""
    assert np.array_equal(_combine(given_choices, _plan(given_choices, table)), plain_combine(given_choices))


@given(given_choices=choices(), tables_given=st.tuples(TABLES, TABLES), lost=st.integers(0, 15))
def test_calls_planned_again_elsewhere_change_no_bit(
    given_choices: Choices, tables_given: tuple[RoutingTable, RoutingTable], lost: int
) -> None:
    """Any subset of the calls is lost and its pairs are planned on another table."""
    plan = _plan(given_choices, tables_given[0])
    kept = [call for i, call in enumerate(plan.calls) if not lost >> i & 1]
    for i, call in enumerate(plan.calls):
        if lost >> i & 1:
            kept += _plan_pairs(call.assignments(), tables_given[1]).calls
    total = _combine(given_choices, DispatchPlan(LAYER, 8, tuple(kept)))
    assert np.array_equal(total, plain_combine(given_choices))


@given(given_choices=choices(), table=TABLES)
def test_rows_go_to_first_copies_in_the_order_of_the_choices_when_no_loads_matter(
    given_choices: Choices, table: RoutingTable
) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    plan = plan_dispatch(pairs, table, layer_idx=LAYER, loads=None)
    homes = [table.worker_ids[held[0]] for held in table.routes(LAYER).copies_E]
    got = {
        call.worker_id: (
            [(int(call.token_idx_R[r]), int(e), w) for r, e, w in zip(*_rows(call), strict=True)],
            call.may_load,
        )
        for call in plan.calls
    }
    chosen = given_choices.pairs()
    assert got == {
        name: ([pair for pair in chosen if homes[pair[1]] == name], False)
        for name in {homes[e] for _, e, _ in chosen}
    }


def _rows(call: WorkerCall) -> tuple[np.ndarray, ...]:
    return call.row_idx_A, call.expert_idx_A, call.weight_A


@given(given_choices=choices(), seed=st.integers(0, 99))
def test_plan_without_loads_is_the_plan_with_them_where_each_expert_has_one_copy(
    given_choices: Choices, seed: int
) -> None:
    workers = np.random.default_rng(seed).integers(0, 3, NUM_EXPERTS).tolist()
    table = build_table(
        version=1,
        num_experts=NUM_EXPERTS,
        worker_ids=["w0", "w1", "w2"],
        layers={LAYER: [r for e, w in enumerate(workers) for r in copies(e, [w], [1])]},
    )
    assert table.routes(LAYER).is_single
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    quick = plan_dispatch(pairs, table, layer_idx=LAYER, loads=None)
    usual = _plan_pairs(pairs, table)
    assert _as_lists(quick) == _as_lists(usual)


def _as_lists(plan: DispatchPlan) -> list[tuple[object, ...]]:
    return [
        (call.worker_id, call.may_load, call.token_idx_R.tolist(), *(part.tolist() for part in _rows(call)))
        for call in plan.calls
    ]


def test_choices_none_of_which_is_empty_are_not_copied_and_their_tokens_are_kept() -> None:
    """The next batch gets the same array of tokens: nobody may write into it."""
    ids_TK, weights_TK = np.zeros((5, 2), dtype=np.int32), np.ones((5, 2), dtype=np.float32)
    first, second = assignments_of(ids_TK, weights_TK), assignments_of(ids_TK, weights_TK)
    assert np.shares_memory(first.expert_idx_A, ids_TK)
    assert np.shares_memory(first.weight_A, weights_TK)
    assert np.shares_memory(first.token_idx_A, second.token_idx_A)
    with pytest.raises(ValueError, match="read-only"):
        first.token_idx_A[0] = 7


def test_calls_do_not_change_when_the_choices_are_written_over() -> None:
    table = build_table(version=1, num_experts=1, worker_ids=["w"], layers={LAYER: copies(0, [0], [1])})
    ids_TK, weights_TK = np.zeros((3, 1), dtype=np.int32), np.ones((3, 1), dtype=np.float32)
    (call,) = plan_dispatch(assignments_of(ids_TK, weights_TK), table, layer_idx=LAYER, loads=None).calls
    ids_TK[:], weights_TK[:] = 9, 9
    assert (call.expert_idx_A.tolist(), call.weight_A.tolist()) == ([0] * 3, [1] * 3)


def test_call_may_load_only_when_one_of_its_experts_has_no_usable_copy() -> None:
    """Worker 0 is out of reach: expert 0 is asked of 1 or 2, where expert 2 and 3 are at home."""
    replicas = [*copies(0, [0], [1]), *copies(1, [0, 1], [1, 1]), *copies(2, [1], [1]), *copies(3, [2], [1])]
    table = build_table(version=1, num_experts=4, worker_ids=["w0", "w1", "w2"], layers={LAYER: replicas})
    pairs = assignments_of(np.array([[0, 1], [2, 3]], dtype=np.int32), np.ones((2, 2), dtype=np.float32))
    loads = loads_of(backlog=[0, 0, 0], is_usable=[False, True, True])
    plan = plan_dispatch(pairs, table, layer_idx=LAYER, loads=loads)
    got = [(call.worker_id, sorted(call.expert_idx_A.tolist()), call.may_load) for call in plan.calls]
    assert got == [("w1", [0, 1, 2], True), ("w2", [3], False)]


def test_nobody_usable_is_an_error() -> None:
    table = build_table(version=1, num_experts=1, worker_ids=["w"], layers={LAYER: copies(0, [0], [1])})
    pairs = assignments_of(np.array([[0]], dtype=np.int32), np.ones((1, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="no expert worker is usable"):
        plan_dispatch(pairs, table, layer_idx=LAYER, loads=loads_of(backlog=[0], is_usable=[False]))


def test_nothing_chosen_needs_no_call() -> None:
    ids_TK = np.full((3, 2), -1, dtype=np.int32)
    pairs = assignments_of(ids_TK, np.ones((3, 2), dtype=np.float32))
    table = build_table(version=1, num_experts=1, worker_ids=["w"], layers={LAYER: copies(0, [0], [1])})
    assert _plan_pairs(pairs, table).calls == ()


@pytest.mark.parametrize("loads", [None, loads_of(backlog=[0])], ids=["first copies", "by loads"])
def test_expert_that_the_table_does_not_know_is_stale(loads: WorkerLoads | None) -> None:
    table = build_table(version=1, num_experts=1, worker_ids=["w"], layers={LAYER: copies(0, [0], [1])})
    pairs = assignments_of(np.array([[1]], dtype=np.int32), np.ones((1, 1), dtype=np.float32))
    with pytest.raises(StaleTable, match="expert 1 is not among 1"):
        plan_dispatch(pairs, table, layer_idx=LAYER, loads=loads)


def test_layer_that_the_table_does_not_know_is_stale() -> None:
    table = build_table(version=1, num_experts=6, worker_ids=["w"], layers={})
    given_choices = random_choices(2)
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    with pytest.raises(StaleTable, match="no layer 3"):
        _plan_pairs(pairs, table)
