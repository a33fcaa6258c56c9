"""The replica bias: copies with least to do get the rows, and nothing but time depends on it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experts.plan import add_partial, assignments_of, plan_dispatch
from router.experts.replicas import ReplicaChoice, WorkerLoads, choose_replicas
from router.experts.table import LayerRoutes, RoutingTable, build_table
from tests.unit.router.experts.harness import (
    LAYER,
    Choices,
    choices,
    copies,
    loads_of,
    partial_sums,
    plain_combine,
    tables,
    usable_loads,
)
from wire.phases import PHASES, Phase

TABLES = tables(num_experts=6, version=1)


def routes_of(*workers_of: list[int], shares: list[int] | None = None) -> LayerRoutes:
    """Expert i on the workers workers_of[i], of as many workers as are named."""
    replicas = [r for e, ws in enumerate(workers_of) for r in copies(e, ws, shares or [1] * len(ws))]
    names = [f"w{i}" for i in range(1 + max(map(max, workers_of)))]
    table = build_table(version=1, num_experts=len(workers_of), worker_ids=names, layers={LAYER: replicas})
    return table.routes(LAYER)


def choose(routes: LayerRoutes, experts: list[int], loads: WorkerLoads) -> ReplicaChoice:
    """One token for each expert that is named."""
    return choose_replicas(routes, np.array(experts, dtype=np.int64), np.arange(len(experts)), loads)


def rows_of(choice: ReplicaChoice, num_workers: int) -> list[int]:
    return np.bincount(choice.worker_A, minlength=num_workers).tolist()


def test_docstring_example() -> None:
    """10 rows over the levels 4 and 0, each row costs 1: 3 and 7."""
    got = choose(routes_of([0, 1]), [0] * 10, loads_of(backlog=[4, 0]))
    assert rows_of(got, 2) == [3, 7]
    assert not got.may_load_A.any()


@pytest.mark.parametrize(
    ("backlog", "cost", "rows"),
    [
        ([0, 0], [1, 1], [5, 5]),
        ([20, 0], [1, 1], [0, 10]),
        ([0, 0], [4, 1], [2, 8]),
        ([0, 0, 0], [1, 1, 1], None),
        ([0, 7, 1], [1, 1, 1], [6, 0, 4]),
        ([9, 0, 0], [1, 2, 2], [0, 5, 5]),
    ],
)
def test_rows_of_one_expert_are_poured(
    backlog: list[float], cost: list[float], rows: list[int] | None
) -> None:
    """None = as even as 10 rows over three can be."""
    got = rows_of(
        choose(routes_of(list(range(len(cost)))), [0] * 10, loads_of(backlog=backlog, cost=cost)), len(cost)
    )
    assert got == rows if rows else sorted(got) == [3, 3, 4]


@st.composite
def pours(draw: st.DrawFn) -> tuple[int, WorkerLoads]:
    """Rows of one expert that is everywhere, over workers with anything before them."""
    num_workers = draw(st.integers(1, 6))
    backlog = draw(st.lists(st.floats(0, 1e4), min_size=num_workers, max_size=num_workers))
    cost = draw(st.lists(st.floats(1, 50), min_size=num_workers, max_size=num_workers))
    return draw(st.integers(1, 300)), loads_of(backlog=backlog, cost=cost)


@given(pours())
def test_heights_are_level_within_one_rows_cost(given_pour: tuple[int, WorkerLoads]) -> None:
    """Whoever got rows ends within one row of the common height, whoever got none was above it."""
    num_rows, loads = given_pour
    cost_W = np.array(loads.row_cost_W)
    got = rows_of(choose(routes_of(list(range(len(cost_W)))), [0] * num_rows, loads), len(cost_W))
    assert sum(got) == num_rows
    height_W = np.array(loads.backlog_W) + np.array(got) * cost_W
    has_rows_W = np.array(got) > 0
    low = (height_W + cost_W).min()
    assert (height_W[has_rows_W] - cost_W[has_rows_W] <= low + 1e-6).all()


@given(num_rows=st.integers(1, 300), cost=st.lists(st.floats(1, 50), min_size=2, max_size=6))
def test_copies_whose_rows_cost_less_get_more(num_rows: int, cost: list[float]) -> None:
    """By one row at most not, which rounding takes."""
    loads = loads_of(backlog=[0] * len(cost), cost=cost)
    got = rows_of(choose(routes_of(list(range(len(cost)))), [0] * num_rows, loads), len(cost))
    by_cost = [rows for _, rows in sorted(zip(cost, got, strict=True), key=lambda item: item[0])]
    assert all(cheap >= dear - 1 for cheap, dear in itertools.pairwise(by_cost))


def test_rows_without_a_choice_come_first() -> None:
    """Expert 1 lives on worker 0 alone; its 6 rows push those of expert 0 aside, whatever their order."""
    for experts in ([0] * 4 + [1] * 6, [1] * 6 + [0] * 4):
        assert rows_of(choose(routes_of([0, 1], [0]), experts, loads_of(backlog=[0, 0])), 2) == [6, 4]


def test_expert_of_fewest_copies_is_poured_first() -> None:
    """Expert 0 has 4 rows over workers 0 and 1, then expert 1 has 8 over all three: 4 on each."""
    got = choose(routes_of([0, 1], [0, 1, 2]), [1] * 8 + [0] * 4, loads_of(backlog=[0, 0, 0]))
    assert sorted(got.worker_A[-4:].tolist()) == [0, 0, 1, 1]
    assert rows_of(got, 3) == [4, 4, 4]


def test_rows_without_a_choice_count_more_at_a_straggler() -> None:
    """Expert 1's 3 rows make worker 0 as full as 9 would another: all 8 rows of expert 0 go to worker 1."""
    got = choose(routes_of([0, 1], [0]), [1] * 3 + [0] * 8, loads_of(backlog=[0, 0], cost=[3, 1]))
    assert rows_of(got, 2) == [3, 8]


def test_most_chosen_expert_is_poured_first_among_equals() -> None:
    """Expert 1 has 8 rows over workers 1 and 2, expert 0 then 2 over 0 and 1: 4 on 2, 4 on 1, 2 on 0."""
    got = choose(routes_of([0, 1], [1, 2]), [0] * 2 + [1] * 8, loads_of(backlog=[0, 0, 0]))
    assert rows_of(got, 3) == [2, 4, 4]


def worker_of_one_row(routes: LayerRoutes, token: int) -> int:
    """The worker of expert 0's only row, where all have as much to do."""
    loads = loads_of(backlog=[3] * (1 + int(routes.worker_EM.max())))
    return int(choose_replicas(routes, np.array([0]), np.array([token]), loads).worker_A[0])


@pytest.mark.parametrize(("token", "first"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_shares_decide_between_copies_with_as_much_to_do(token: int, first: int) -> None:
    """The points of rows 0 to 3 are 0.00, 0.62, 0.24, 0.85."""
    assert worker_of_one_row(routes_of([0, 1]), token) == first


@pytest.mark.parametrize("shares", [[1, 9], [9, 1], [1, 1, 1], [1, 4, 5]])
def test_lone_rows_are_spread_by_the_shares(shares: list[int]) -> None:
    routes = routes_of(list(range(len(shares))), shares=shares)
    got = [worker_of_one_row(routes, token) for token in range(1000)]
    expected = [1000 * share / sum(shares) for share in shares]
    assert [got.count(worker) for worker in range(len(shares))] == pytest.approx(expected, abs=4)


@given(given_choices=choices(), table=TABLES, loads=usable_loads())
def test_rows_go_to_usable_workers_and_to_strangers_only_without_a_usable_copy(
    given_choices: Choices, table: RoutingTable, loads: WorkerLoads
) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    loads = usable_part(loads, table)
    got = choose_replicas(table.routes(LAYER), pairs.expert_idx_A, pairs.token_idx_A, loads)
    assert all(loads.is_usable_W[w] for w in got.worker_A)
    held = {(r.worker_idx, r.expert_idx) for r in table.routes(LAYER).replicas}
    usable = {(w, e) for w, e in held if loads.is_usable_W[w]}
    chosen = zip(got.worker_A.tolist(), pairs.expert_idx_A.tolist(), got.may_load_A.tolist(), strict=True)
    assert all(((w, e) in usable) is not may_load for w, e, may_load in chosen)
    lost = {e for _, e in held} - {e for _, e in usable}
    assert got.may_load_A.tolist() == [e in lost for e in pairs.expert_idx_A.tolist()]


def usable_part(loads: WorkerLoads, table: RoutingTable) -> WorkerLoads:
    """The loads of as many workers as the table has, one of them usable at least."""
    num_workers = len(table.worker_ids)
    is_usable_W = list(loads.is_usable_W[:num_workers])
    is_usable_W[0] |= not any(is_usable_W)
    return WorkerLoads(
        is_usable_W=is_usable_W,
        backlog_W=loads.backlog_W[:num_workers],
        row_cost_W=loads.row_cost_W[:num_workers],
    )


@given(backlog=st.lists(st.floats(0, 1e3), min_size=4, max_size=4), num_rows=st.integers(1, 9))
def test_stand_in_is_the_same_for_every_dispatcher(backlog: list[float], num_rows: int) -> None:
    """Whatever waits where, and whatever else is asked: so that one worker loads the expert, not all."""
    loads = loads_of(backlog=backlog, is_usable=[False, True, True, True])
    routes = routes_of([0], [0], [0], [1, 2, 3])
    alone = [
        choose(routes, [e], loads_of(backlog=[0] * 4, is_usable=[False, True, True, True])) for e in range(3)
    ]
    together = choose(routes, [0, 1, 2] + [3] * num_rows, loads)
    assert together.worker_A[:3].tolist() == [int(one.worker_A[0]) for one in alone]
    assert sorted(together.worker_A[:3].tolist()) == [1, 2, 3]
    assert together.may_load_A.tolist() == [True] * 3 + [False] * num_rows


@given(given_choices=choices(), loads=usable_loads())
def test_experts_of_one_copy_go_the_same_way_beside_one_of_several(
    given_choices: Choices, loads: WorkerLoads
) -> None:
    routes = routes_of([0], [1], [2], [3], [0], [1], [2, 3])
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    loads = replace(loads, is_usable_W=[True] * 4)
    alone = choose_replicas(routes, pairs.expert_idx_A, pairs.token_idx_A, loads)
    with_copies = (np.append(pairs.expert_idx_A, 6), np.append(pairs.token_idx_A, 0))
    beside = choose_replicas(routes, *with_copies, loads)
    assert alone.worker_A.tolist() == beside.worker_A[:-1].tolist()
    assert alone.worker_A.tolist() == routes.home_E[pairs.expert_idx_A].tolist()
    assert not alone.may_load_A.any()
    assert not beside.may_load_A.any()


@pytest.mark.parametrize("experts", [[], [0], [0, 1]])
def test_nobody_usable_is_an_error(experts: list[int]) -> None:
    with pytest.raises(ValueError, match="no expert worker is usable"):
        choose(routes_of([0, 1], [1]), experts, loads_of(backlog=[0, 0], is_usable=[False, False]))


def test_nothing_to_place_is_no_choice() -> None:
    for routes in (routes_of([0], [1]), routes_of([0, 1], [1])):
        got = choose(routes, [], loads_of(backlog=[0, 0]))
        assert (got.worker_A.shape, got.may_load_A.shape) == ((0,), (0,))


@given(given_choices=choices(), table=TABLES, loads=usable_loads())
def test_loads_change_no_output(given_choices: Choices, table: RoutingTable, loads: WorkerLoads) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    plan = plan_dispatch(pairs, table, layer_idx=LAYER, loads=usable_part(loads, table))
    total_TD = np.zeros(given_choices.x_TD.shape)
    for call in plan.calls:
        add_partial(total_TD, call, partial_sums(given_choices.x_TD[call.token_idx_R], call))
    assert np.array_equal(total_TD.astype(np.float32), plain_combine(given_choices))


@given(
    given_choices=choices(),
    table=tables(num_experts=6, is_by_phase=True),
    loads=usable_loads(),
    phase=st.sampled_from(PHASES),
)
def test_rows_leave_the_workers_of_their_phase_only_when_none_of_those_can_be_reached(
    given_choices: Choices, table: RoutingTable, loads: WorkerLoads, phase: Phase
) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    loads = usable_part(loads, table)
    choice = choose_replicas(table.routes(LAYER, phase), pairs.expert_idx_A, pairs.token_idx_A, loads)
    for expert, worker, may_load in zip(
        pairs.expert_idx_A.tolist(), choice.worker_A.tolist(), choice.may_load_A.tolist(), strict=True
    ):
        usable = [w for w in table.routes(LAYER).copies_E[expert] if loads.is_usable_W[w]]
        own = [w for w in usable if table.worker_phases.get(table.worker_ids[w]) == phase]
        assert may_load == (not usable)
        assert worker in (own or usable or np.flatnonzero(loads.is_usable_W))


@given(given_choices=choices(), table=TABLES, loads=usable_loads())
def test_same_question_has_the_same_answer(
    given_choices: Choices, table: RoutingTable, loads: WorkerLoads
) -> None:
    pairs = assignments_of(given_choices.ids_TK, given_choices.weights_TK)
    loads = usable_part(loads, table)
    before = list(loads.backlog_W)
    first, second = (
        choose_replicas(table.routes(LAYER), pairs.expert_idx_A, pairs.token_idx_A, loads) for _ in range(2)
    )
    assert first.worker_A.tolist() == second.worker_A.tolist()
    assert loads.backlog_W == before
