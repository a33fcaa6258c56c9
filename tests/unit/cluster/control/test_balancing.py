"""One look at the load: what is proposed suits it, shares are whole, and level load moves nothing."""

from collections import defaultdict

import numpy as np

from cluster.balance.decide import MoveTerms
from cluster.control.balancing import Placed, make_phase_loads, propose
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


def test_made_up_loads_follow_their_seed() -> None:
    first, again, other = (make_phase_loads(SHAPE, seed)["decode"][2] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.shape == (8,)
    assert make_phase_loads(SHAPE, 1)["prefill"][2].tolist() != first.tolist()


def test_levelness_of_a_phase_is_that_of_its_own_rows() -> None:
    """Rows that are level together can be uneven in each phase."""
    halves = (np.repeat([30.0, 10.0], 4), np.repeat([10.0, 30.0], 4))
    loads = {phase: {1: rows_E, 2: rows_E} for phase, rows_E in zip(PHASES, halves, strict=True)}
    proposal = propose(placed(4), loads, TERMS)
    assert proposal.balance == 1.0
    assert proposal.phase_balance == {"prefill": 2 / 3, "decode": 2 / 3}
