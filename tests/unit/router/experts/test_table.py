"""The routing table: what is refused, how it travels, how a row finds its replica."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.experts.table import Replica, RoutingTable, build_table, table_from_proto, table_to_proto
from tests.unit.router.experts.harness import LAYER, copies, tables
from wire.errors import StaleTable
from wire.phases import PHASES

GOOD = (*copies(0, [0], [1]), *copies(1, [0, 1], [1, 1]))


def _build(*replicas: Replica, num_experts: int = 2) -> RoutingTable:
    return build_table(version=9, num_experts=num_experts, worker_ids=["a", "b"], layers={LAYER: replicas})


def _replica_of(table: RoutingTable, expert_idx: int, row: int) -> Replica:
    """The plain reference: walk the shares until the row's point is passed."""
    point = math.modf(row * (5**0.5 - 1) / 2)[0]
    held = [r for r in table.routes(LAYER).replicas if r.expert_idx == expert_idx]
    for i in range(len(held)):
        if point < sum(r.share for r in held[: i + 1]):
            return held[i]
    return held[-1]


def _choose(table: RoutingTable, expert_idx: int, rows: range) -> list[int]:
    """The worker that the shares choose for each row."""
    return [int(table.routes(LAYER).copies_of(expert_idx, row_idx=row)[0]) for row in rows]


def test_docstring_example_of_shares() -> None:
    assert _choose(_build(*GOOD), 1, range(4)) == [0, 1, 0, 1]


def test_glossary_example_of_slots_and_replicas() -> None:
    """4 experts, 2 workers of 3 slots: 6 slots, two experts have a second replica that takes half."""
    placed = [[0, 1], [0, 1], [0], [1]]
    replicas = [
        r for expert, workers in enumerate(placed) for r in copies(expert, workers, [1] * len(workers))
    ]
    table = _build(*replicas, num_experts=4)
    assert len(table.routes(LAYER).replicas) == 6
    rows = range(1000)
    assert _choose(table, 0, rows).count(1) == pytest.approx(500, abs=3)
    assert set(_choose(table, 2, rows)) == {0}
    assert set(_choose(table, 3, rows)) == {1}


@pytest.mark.parametrize(
    ("replicas", "what"),
    [
        (GOOD[:1], "expert 1: 0 replicas"),
        ((), "expert 0: 0 replicas"),
        ((*GOOD[:2],), "expert 1: 1 replicas, shares sum to 0.5"),
        ((*GOOD, *copies(1, [1], [1])), "expert 1: 3 replicas, shares sum to 2.0"),
        ((GOOD[0], *(replace(r, share=s) for r, s in zip(GOOD[1:], (1.5, -0.5), strict=True))), "shares > 0"),
        ((GOOD[0], *(replace(r, share=s) for r, s in zip(GOOD[1:], (1.0, 0.0), strict=True))), "shares > 0"),
        ((*GOOD[:2], replace(GOOD[2], share=0.5 + 1e-5)), "sum 1"),
        ((replace(GOOD[0], worker_idx=2), *GOOD[1:]), "worker_idx=2.* is outside 2 experts, 2 workers"),
        ((replace(GOOD[0], worker_idx=-1), *GOOD[1:]), "worker_idx=-1.* is outside"),
        ((*GOOD, *copies(2, [0], [1])), "expert_idx=2.* is outside"),
        ((*GOOD, *copies(-1, [0], [1])), "expert_idx=-1.* is outside"),
    ],
)
def test_table_with_a_hole_is_refused_by_name(replicas: tuple[Replica, ...], what: str) -> None:
    with pytest.raises(StaleTable, match=f"layer {LAYER}.*{what}"):
        _build(*replicas)


def test_unknown_layer_is_stale() -> None:
    with pytest.raises(StaleTable, match=r"table 9 has no layer 4; it has \[3\]"):
        _build(*GOOD).routes(4)


def test_layers_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        _build(*GOOD).layers[5] = _build(*GOOD).routes(LAYER)  # type: ignore[index]


@given(table=tables(num_experts=4, version=2**40))
def test_table_survives_the_wire(table: RoutingTable) -> None:
    """Shares travel as float32; everything else arrives as it was."""
    got = table_from_proto(table_to_proto(table))
    assert (got.version, got.num_experts, got.worker_ids) == (table.version, 4, table.worker_ids)
    assert list(got.layers) == list(table.layers)
    for mine, theirs in zip(table.routes(LAYER).replicas, got.routes(LAYER).replicas, strict=True):
        assert replace(theirs, share=mine.share) == mine
        assert theirs.share == np.float32(mine.share)
    np.testing.assert_array_equal(got.routes(LAYER).worker_EM, table.routes(LAYER).worker_EM)
    both = zip(got.routes(LAYER).threshold_E, table.routes(LAYER).threshold_E, strict=True)
    assert all(ends == pytest.approx(wanted, abs=1e-6) for ends, wanted in both)


PHASED = build_table(
    version=9,
    num_experts=3,
    worker_ids=["a", "b", "c"],
    layers={LAYER: [*copies(0, [0, 1, 2], [1, 3, 4]), *copies(1, [2], [1]), *copies(2, [0], [1])]},
    worker_phases={"a": "prefill", "b": "prefill", "c": "decode"},
)


def test_rows_of_a_phase_go_to_its_workers_in_their_own_proportion() -> None:
    prefill, decode = (PHASED.routes(LAYER, phase) for phase in PHASES)
    assert prefill.copies_E == ((0, 1), (2,), (0,))
    assert prefill.threshold_E[0] == (0.25,), "their shares are 1 and 3 of 8"
    assert decode.copies_E == ((2,), (2,), (0,)), "an expert that none of them holds keeps its copies"
    assert PHASED.routes(LAYER).copies_E == ((0, 1, 2), (2,), (0,))
    assert prefill.spare is decode.spare is PHASED.routes(LAYER)


def test_every_worker_takes_the_rows_of_both_phases_unless_told_otherwise() -> None:
    table = _build(*GOOD)
    assert table.routes(LAYER, "prefill") is table.routes(LAYER, "decode") is table.routes(LAYER)


def test_phases_travel_and_unknown_ones_are_refused() -> None:
    message = table_to_proto(PHASED)
    got = table_from_proto(message)
    assert got.worker_phases == PHASED.worker_phases
    assert got.routes(LAYER, "prefill").copies_E == PHASED.routes(LAYER, "prefill").copies_E
    message.worker_phases["c"] = "both"
    with pytest.raises(StaleTable, match="'both'"):
        table_from_proto(message)


def test_layers_keep_their_indices_on_the_wire() -> None:
    table = build_table(version=1, num_experts=2, worker_ids=["a", "b"], layers={7: GOOD, 2: GOOD[::-1]})
    got = table_from_proto(table_to_proto(table))
    assert {layer: routes.replicas for layer, routes in got.layers.items()} == {7: GOOD, 2: GOOD[::-1]}


def test_message_that_is_no_whole_table_is_refused() -> None:
    message = table_to_proto(_build(*GOOD))
    message.layers[0].worker_idx[0] = 5
    with pytest.raises(StaleTable, match="worker_idx=5"):
        table_from_proto(message)


@given(table=tables(num_experts=3), first_row=st.integers(0, 2**20))
@example(table=_build(*GOOD, *copies(2, [1, 0], [1, 4]), num_experts=3), first_row=0)
def test_rows_go_where_the_plain_walk_sends_them(table: RoutingTable, first_row: int) -> None:
    """So the worker that is chosen always holds the expert."""
    rows = range(first_row, first_row + 30)
    for expert_idx in range(3):
        expected = [_replica_of(table, expert_idx, row).worker_idx for row in rows]
        assert _choose(table, expert_idx, rows) == expected


@given(table=tables(num_experts=3), first_row=st.integers(0, 2**20), num_rows=st.integers(1, 400))
def test_shares_hold_over_any_run_of_rows(table: RoutingTable, first_row: int, num_rows: int) -> None:
    """Multiples of the golden ratio miss an interval's fair part by a few rows only, however long the run."""
    workers = _choose(table, 2, range(first_row, first_row + num_rows))
    for replica in table.routes(LAYER).replicas:
        if replica.expert_idx == 2:
            assert abs(workers.count(replica.worker_idx) - replica.share * num_rows) <= 4


@given(table=tables(num_experts=3), row=st.integers(0, 2**30))
def test_copies_are_all_that_hold_the_expert_in_their_order_from_the_chosen_one_on(
    table: RoutingTable, row: int
) -> None:
    for expert_idx in range(3):
        held = [r.worker_idx for r in table.routes(LAYER).replicas if r.expert_idx == expert_idx]
        begin = held.index(_replica_of(table, expert_idx, row).worker_idx)
        got = table.routes(LAYER).copies_of(expert_idx, row_idx=row)
        assert list(got) == held[begin:] + held[:begin]


@given(table=tables(num_experts=3))
def test_number_of_copies_is_that_of_the_replicas(table: RoutingTable) -> None:
    held = [replica.expert_idx for replica in table.routes(LAYER).replicas]
    assert list(map(len, table.routes(LAYER).copies_E)) == [held.count(expert_idx) for expert_idx in range(3)]
