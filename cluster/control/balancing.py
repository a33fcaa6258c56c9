"""One look at the load: which placement would be better, and whether it is worth the move. Pure.

Letters: E logical experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.balance.decide import MoveDecision, MoveTerms, decide_move
from cluster.balance.live import loads_of, plan_of, plan_rebalance, plan_rebalance_shares
from cluster.balance.measure import balance_of, worker_loads
from cluster.balance.window import Loads, PhaseLoads, total_of
from cluster.control.routes import Shares
from cluster.placement import ExpertHost, ExpertShape, Placement
from wire.phases import PHASES, Phase
from workers.expert.types import Place

_SPREAD = 1.0
"""Standard deviation of the logarithm of made-up loads: the busiest of 8 gets about 3 times the mean."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What is placed where now."""

    shape: ExpertShape
    hosts: Sequence[ExpertHost]
    """The workers of the placement, in its order."""
    num_slots: int
    """Of each worker in each layer; 0 = just enough."""
    placement: Placement


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A placement for the load, and what is to be said for it."""

    candidate: Placement
    shares: Shares
    """Of the candidate's copies."""
    decision: MoveDecision
    balance: float
    """Mean over most load of a worker with the placement in force, over all layers, (0, 1]."""
    phase_balance: Mapping[Phase, float]
    """The same of the rows of each phase alone."""


def propose(placed: Placed, phase_loads: PhaseLoads, terms: MoveTerms) -> Proposal:
    """The placement that suits the load, few copies away from the one in force."""
    loads = total_of(phase_loads)
    candidate = plan_rebalance(
        placed.shape, placed.hosts, loads, num_slots=placed.num_slots, previous=placed.placement
    )
    decision = decide_move(placed.shape, loads, current=placed.placement, candidate=candidate, terms=terms)
    return Proposal(
        candidate=candidate,
        shares=_by_place(candidate, plan_rebalance_shares(placed.shape, candidate, loads)),
        decision=decision,
        balance=_balance(placed, loads),
        phase_balance={phase: _balance(placed, of_phase) for phase, of_phase in phase_loads.items()},
    )


def _balance(placed: Placed, loads: Loads) -> float:
    num_slots = 1 + max(slot.slot_idx for slots in placed.placement.values() for slot in slots)
    plan_LWX = plan_of(placed.shape, list(placed.placement), placed.placement, num_slots=num_slots)
    return float(balance_of(worker_loads(loads_of(placed.shape, loads), plan_LWX)).mean())


def make_phase_loads(shape: ExpertShape, seed: int) -> PhaseLoads:
    """Loads drawn from a seed for each phase, as uneven as real ones, to set experts in motion on purpose."""
    return {phase: make_loads(shape, (seed, number)) for number, phase in enumerate(PHASES)}


def make_loads(shape: ExpertShape, seed: int | Sequence[int]) -> Loads:
    """Loads drawn from a seed, as uneven as real ones."""
    rng = np.random.default_rng(seed)
    return {layer_idx: rng.lognormal(sigma=_SPREAD, size=shape.num_experts) for layer_idx in shape.layer_ids}


def _by_place(placement: Placement, shares: Mapping[str, Sequence[float]]) -> Shares:
    by_place: dict[Place, dict[str, float]] = {}
    for worker_id, slots in placement.items():
        for slot, share in zip(slots, shares[worker_id], strict=True):
            held = by_place.setdefault(slot.place, {})
            held[worker_id] = held.get(worker_id, 0.0) + share
    return by_place
