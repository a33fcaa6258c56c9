"""One look at the load: what is proposed suits it, shares are whole, and level load moves nothing."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from cluster.balance.decide import MoveTerms
from cluster.balance.window import PhaseLoads
from cluster.control.balancing import Placed, Proposal, make_phase_loads, propose
from cluster.placement import ExpertHost, ExpertShape, plan_placement
from wire.phases import PHASES

SHAPE = ExpertShape(num_experts=8, layer_ids=(1, 2))
HOSTS = [ExpertHost(worker_id=name) for name in ("a", "b")]
TERMS = MoveTerms(bytes_per_expert=100, bytes_per_s=1e9, step_bytes=200, stay_s=60.0, min_gain=0.05)


def placed(num_slots: int) -> Placed:
    placement = plan_placement(SHAPE, HOSTS, num_slots=num_slots)
    return Placed(shape=SHAPE, hosts=HOSTS, num_slots=num_slots, placement=placement)


def test_skewed_load_is_worth_a_move_in_steps_that_end_in_the_candidate() -> None:
    rows_E = np.array([100.0, 90, 80, 70, 1, 1, 1, 1])
    proposal = propose(placed(4), {"decode": {1: rows_E, 2: rows_E}}, TERMS)
    assert proposal.balance < 0.6
    assert proposal.decision.is_worth
    assert len(proposal.decision.steps) > 1
    assert proposal.decision.steps[-1].placement == proposal.candidate
    heavy = [
        {slot.expert_idx for slot in slots if slot.layer_idx == 1} for slots in proposal.candidate.values()
    ]
    assert [len(held & {0, 1, 2, 3}) for held in heavy] == [2, 2]


def test_level_load_moves_nothing() -> None:
    proposal = propose(placed(4), {}, TERMS)
    assert not proposal.decision.is_worth
    assert proposal.balance == 1.0


def test_shares_of_every_expert_sum_to_one_over_its_workers() -> None:
    proposal = propose(placed(6), make_phase_loads(SHAPE, 3), TERMS)
    holders = defaultdict(set)
    for worker_id, slots in proposal.candidate.items():
        for slot in slots:
            holders[slot.place].add(worker_id)
    assert {place: set(shares) for place, shares in proposal.shares.items()} == holders
    assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in proposal.shares.values())


HALVES = (np.repeat([30.0, 10.0], 4), np.repeat([10.0, 30.0], 4))
"""Rows of prefill and decode that are level together."""


def by_phase(num_slots: int = 8) -> tuple[Placed, Proposal]:
    """Four workers and what is proposed for two phases that want different experts."""
    four = [ExpertHost(worker_id=name) for name in "abcd"]
    placement = plan_placement(SHAPE, four, num_slots=num_slots)
    placed = Placed(shape=SHAPE, hosts=four, num_slots=num_slots, placement=placement)
    return placed, propose(placed, loads_of_phases(), TERMS, placements="by_phase")


def loads_of_phases(factor: float = 1.0) -> PhaseLoads:
    rows = zip(PHASES, HALVES, (factor, 1.0), strict=True)
    return {phase: {1: rows_E * by, 2: rows_E * by} for phase, rows_E, by in rows}


def after(placed: Placed, proposal: Proposal) -> Placed:
    return replace(placed, placement=proposal.candidate, worker_phases=proposal.worker_phases)


def test_placements_by_phase_are_level_for_each_phase_and_stay() -> None:
    placed, proposal = by_phase(num_slots=4)
    assert proposal.decision.reason == "needed"
    assert Counter(proposal.worker_phases.values()) == {"prefill": 2, "decode": 2}
    again = propose(after(placed, proposal), loads_of_phases(), TERMS, placements="by_phase")
    assert max(proposal.phase_balance.values()) < 0.9
    assert again.phase_balance == {"prefill": 1.0, "decode": 1.0}
    assert again.balance == 1.0
    assert not again.decision.is_worth


def test_shares_by_phase_are_whole_in_each_phase() -> None:
    _, proposal = by_phase(num_slots=6)
    for place, shares in proposal.shares.items():
        for phase in PHASES:
            own = {w: share for w, share in shares.items() if proposal.worker_phases[w] == phase}
            assert sum(own.values()) == pytest.approx(1.0)
            assert set(own) == {w for w in own if any(slot.place == place for slot in proposal.candidate[w])}


def test_too_few_slots_for_two_placements_leave_one() -> None:
    _, proposal = by_phase(num_slots=3)
    assert proposal.worker_phases == {}
    assert proposal.decision.reason != "needed"


def test_workers_change_sides_with_the_load_only_where_it_is_worth_the_move() -> None:
    placed, proposal = by_phase()
    placed = after(placed, proposal)
    grown = propose(placed, loads_of_phases(3.0), TERMS, placements="by_phase")
    assert Counter(grown.worker_phases.values()) == {"prefill": 3, "decode": 1}
    dear = replace(TERMS, bytes_per_s=1e-3, bytes_per_expert=10**6)
    few_slots, before = by_phase(num_slots=4)
    stays = propose(after(few_slots, before), loads_of_phases(3.0), dear, placements="by_phase")
    assert stays.worker_phases == before.worker_phases
    assert not stays.decision.is_worth


def test_phases_come_together_again_when_so_configured() -> None:
    placed, proposal = by_phase(num_slots=4)
    joint = propose(after(placed, proposal), loads_of_phases(), TERMS)
    assert (joint.decision.reason, joint.worker_phases) == ("needed", {})


def test_made_up_loads_follow_their_seed() -> None:
    first, again, other = (make_phase_loads(SHAPE, seed)["decode"][2] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.shape == (8,)
    assert make_phase_loads(SHAPE, 1)["prefill"][2].tolist() != first.tolist()


def test_levelness_of_a_phase_is_that_of_its_own_rows() -> None:
    """Rows that are level together can be uneven in each phase."""
    proposal = propose(placed(4), loads_of_phases(), TERMS)
    assert proposal.balance == 1.0
    assert proposal.phase_balance == {"prefill": 2 / 3, "decode": 2 / 3}
