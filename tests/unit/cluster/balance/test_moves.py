"""Steps from one placement to another: every prefix serves, bytes are bounded, the best goes first."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.decide import MoveTerms, decide_move
from cluster.balance.live import plan_rebalance
from cluster.balance.moves import Change, changes_between, plan_bundles, plan_steps
from cluster.balance.window import PhaseLoads
from cluster.placement import ExpertHost, ExpertShape, Placement
from wire.phases import Phase
from workers.expert.types import Slot

SHAPE = ExpertShape(num_experts=6, layer_ids=(0, 1))
EXPERT_BYTES = 10
TERMS = MoveTerms(bytes_per_expert=EXPERT_BYTES, bytes_per_s=1.0, step_bytes=30, stay_s=1000.0, min_gain=0.05)


def one_layer(*workers: Sequence[int]) -> Placement:
    """Workers w0, w1, ... with these experts in their slots of layer 0."""
    return {
        f"w{worker}": tuple(Slot(0, slot, expert) for slot, expert in enumerate(experts))
        for worker, experts in enumerate(workers)
    }


def experts_of(placement: Placement) -> set[tuple[int, int]]:
    return {(slot.layer_idx, slot.expert_idx) for slots in placement.values() for slot in slots}


def moved(changes: Sequence[Change]) -> list[tuple[str, int | None, int | None]]:
    return [(change.worker_id, change.old_expert_idx, change.new_expert_idx) for change in changes]


def planned(num_workers: int, seed: int, previous: Placement) -> Placement:
    hosts = [ExpertHost(worker_id=f"w{i}") for i in range(num_workers)]
    draws = np.random.default_rng(seed)
    loads = {layer_idx: draws.lognormal(0, 1, SHAPE.num_experts) for layer_idx in SHAPE.layer_ids}
    return plan_rebalance(SHAPE, hosts, loads, num_slots=4, previous=previous)


@settings(max_examples=60, deadline=None)
@given(
    old_workers=st.integers(2, 5),
    new_workers=st.integers(2, 5),
    seed=st.integers(0, 50),
    step_bytes=st.integers(1, 100),
)
def test_every_prefix_of_the_steps_serves(
    old_workers: int, new_workers: int, seed: int, step_bytes: int
) -> None:
    current = planned(old_workers, seed, {})
    candidate = planned(new_workers, seed + 1, current if seed % 2 else {})
    changes = changes_between(current, candidate, bytes_per_expert=EXPERT_BYTES)
    steps = plan_steps(current, candidate, changes, gain_of=lambda c: c.slot_idx, step_bytes=step_bytes)
    assert sorted(moved(changes), key=str) == sorted(
        (change for step in steps for change in moved(step.changes)), key=str
    )
    for step in steps:
        assert experts_of(step.placement) == experts_of(candidate)
        assert step.num_bytes == sum(change.num_bytes for change in step.changes)
        # A step above the budget is one bundle, which cannot be cut.
        assert step.num_bytes <= step_bytes or len(plan_bundles(current, step.changes)) == 1
        current = step.placement
    assert current == candidate


def test_exchange_is_one_bundle() -> None:
    current, candidate = one_layer([0], [1]), one_layer([1], [0])
    changes = changes_between(current, candidate, bytes_per_expert=EXPERT_BYTES)
    assert [len(bundle) for bundle in plan_bundles(current, changes)] == [2]


def test_change_goes_alone_where_a_replica_stays() -> None:
    current, candidate = one_layer([0], [1], [0]), one_layer([1], [0], [1])
    changes = changes_between(current, candidate, bytes_per_expert=EXPERT_BYTES)
    assert [moved(bundle) for bundle in plan_bundles(current, changes)] == [
        [("w0", 0, 1)],
        [("w1", 1, 0)],
        [("w2", 0, 1)],
    ]


def test_ring_of_three_is_one_bundle_in_a_step_above_the_budget() -> None:
    current, candidate = one_layer([0], [1], [2]), one_layer([1], [2], [0])
    changes = changes_between(current, candidate, bytes_per_expert=EXPERT_BYTES)
    steps = plan_steps(current, candidate, changes, gain_of=lambda _: 1.0, step_bytes=EXPERT_BYTES)
    assert [step.num_bytes for step in steps] == [3 * EXPERT_BYTES]


def test_best_change_goes_first() -> None:
    current, candidate = one_layer([0, 1, 2], [0, 1, 2]), one_layer([0, 1, 2], [3, 4, 2])
    changes = changes_between(current, candidate, bytes_per_expert=EXPERT_BYTES)
    steps = plan_steps(current, candidate, changes, gain_of=lambda c: c.slot_idx, step_bytes=EXPERT_BYTES)
    assert [moved(step.changes) for step in steps] == [[("w1", 1, 4)], [("w1", 0, 3)]]


def test_expert_that_changes_its_slot_moves_no_bytes() -> None:
    changes = changes_between(one_layer([0, 1]), one_layer([1, 0]), bytes_per_expert=EXPERT_BYTES)
    assert [change.num_bytes for change in changes] == [0, 0]


LOADS: PhaseLoads = {"decode": {0: np.array([80.0, 10, 10, 10, 10, 10]), 1: np.ones(6)}}
ROWS: dict[Phase, float] = {"prefill": 5.0, "decode": 10.0}
PHASE_OF: dict[str, Phase] = {"w0": "prefill", "w1": "decode"}
CURRENT = {
    f"w{worker}": tuple(
        Slot(layer_idx, slot, expert) for layer_idx in (0, 1) for slot, expert in enumerate(experts)
    )
    for worker, experts in enumerate([[0, 1, 2, 3], [3, 4, 5, 1]])
}
BETTER = {
    **CURRENT,
    "w1": (*(Slot(0, slot, expert) for slot, expert in enumerate([0, 4, 5, 1])), *CURRENT["w1"][4:]),
}


def test_gain_above_its_cost_moves() -> None:
    # Layer 0: w0 carries 80 + 5 + 10 + 5 = 100; with two replicas of the first expert 40 + 5 + 10 + 10 = 65.
    # Layer 1: 3 of 6 before and after.
    decision = decide_move(SHAPE, LOADS, current=CURRENT, candidate=BETTER, terms=TERMS)
    assert decision.reason == "gain"
    assert decision.gain == pytest.approx(1 - (65 + 3) / (100 + 3))
    assert decision.net_gain == pytest.approx(decision.gain * (1 - 10 / 1000))
    assert (decision.num_bytes, decision.transfer_s) == (EXPERT_BYTES, 10.0)
    assert decision.steps[-1].placement == BETTER


def test_little_gain_does_not_move() -> None:
    terms = replace(TERMS, min_gain=0.5)
    decision = decide_move(SHAPE, LOADS, current=CURRENT, candidate=BETTER, terms=terms)
    assert (decision.reason, decision.is_worth, decision.steps) == ("too_little", False, ())


def test_gain_that_comes_too_late_does_not_move() -> None:
    terms = replace(TERMS, stay_s=10.0)
    decision = decide_move(SHAPE, LOADS, current=CURRENT, candidate=BETTER, terms=terms)
    assert (decision.reason, decision.is_worth, decision.net_gain) == ("too_slow", False, 0.0)


def test_same_placement_has_nothing_to_move() -> None:
    decision = decide_move(SHAPE, LOADS, current=CURRENT, candidate=CURRENT, terms=TERMS)
    assert (decision.reason, decision.gain, decision.steps) == ("nothing_to_move", 0.0, ())


def test_gain_of_placements_by_phase_is_that_of_the_busiest_worker_under_its_own_rows() -> None:
    # w0 holds all experts for prefill, w1 for decode: 30 and 60 rows a layer. With 5 more copies on w2 for
    # decode, all of decode's rows but the 10 of expert 5 are split in two.
    both = {f"w{i}": tuple(Slot(layer, e, e) for layer in (0, 1) for e in range(6)) for i in range(2)}
    more = both | {"w2": tuple(Slot(layer, e, e) for layer in (0, 1) for e in range(5))}
    loads: PhaseLoads = {phase: {0: rows * np.ones(6), 1: rows * np.ones(6)} for phase, rows in ROWS.items()}
    phases = tuple({**PHASE_OF, **extra} for extra in ({}, {"w2": "decode"}))
    decision = decide_move(SHAPE, loads, current=both, candidate=more, terms=TERMS, phases=phases)
    assert decision.gain == pytest.approx(1 - 2 * (60 - 25) / (2 * 60))


def test_phases_part_whatever_it_costs_and_once() -> None:
    all_of = {f"w{i}": tuple(Slot(layer, e, e) for layer in (0, 1) for e in range(6)) for i in range(2)}
    for phases, reason in [
        (({}, PHASE_OF), "needed"),
        ((PHASE_OF, {}), "needed"),
        ((PHASE_OF, PHASE_OF), "nothing_to_move"),
    ]:
        decision = decide_move(SHAPE, LOADS, current=all_of, candidate=all_of, terms=TERMS, phases=phases)
        assert decision.reason == reason


def test_lost_expert_moves_whatever_it_costs() -> None:
    lost = {**CURRENT, "w1": tuple(slot for slot in CURRENT["w1"] if slot.expert_idx != 5)}
    terms = replace(TERMS, stay_s=1.0)
    decision = decide_move(SHAPE, LOADS, current=lost, candidate=CURRENT, terms=terms)
    assert (decision.reason, decision.is_worth) == ("needed", True)
    assert decision.steps[-1].placement == CURRENT
