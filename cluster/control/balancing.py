"""One look at the load: which placement would be better, and whether it is worth the move. Pure.

Letters: E logical experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.balance.decide import MoveDecision, MoveTerms, decide_move
from cluster.balance.live import loads_of, plan_of, plan_rebalance_shares
from cluster.balance.measure import balance_of, worker_loads
from cluster.balance.phases import WorkerPhases, least_workers, plan_parts, plan_phases, split_parts
from cluster.balance.window import Loads, PhaseLoads
from cluster.control.routes import Shares
from cluster.placement import ExpertHost, ExpertShape, Placement
from wire.phases import PHASES, Phase
from workers.expert.types import Place

Placements = Literal["joint", "by_phase"]
"""One placement for the rows of both phases, or one for each."""

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
    worker_phases: WorkerPhases = field(default_factory=dict)
    """Which of them take the rows of which phase; empty = all take the rows of both."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A placement for the load, and what is to be said for it."""

    candidate: Placement
    shares: Shares
    """Of the candidate's copies."""
    worker_phases: WorkerPhases
    """With the candidate."""
    decision: MoveDecision
    balance: float
    """Mean over most load of a worker with the placement in force, over all layers, (0, 1]."""
    phase_balance: Mapping[Phase, float]
    """The same of the rows of each phase alone, over the workers that take them."""


def propose(
    placed: Placed, loads: PhaseLoads, terms: MoveTerms, *, placements: Placements = "joint"
) -> Proposal:
    """The placement that suits the load, few copies away from the one in force.

    Args:
        placed: what is placed now.
        loads: rows of each phase.
        terms: what a move costs and must bring.
        placements: one for both phases, or one for each where there are workers enough.
    """
    phases: WorkerPhases = {}
    if placements == "by_phase":
        least = least_workers(placed.shape.num_experts, placed.num_slots)
        phases = plan_phases(placed.hosts, loads, least=least, previous=placed.worker_phases)
    proposal = _propose(placed, loads, terms, phases)
    if phases and placed.worker_phases not in ({}, phases) and not proposal.decision.is_worth:
        # The split stays; its placements may still be worth mending.
        return _propose(placed, loads, terms, placed.worker_phases)
    return proposal


def _propose(placed: Placed, loads: PhaseLoads, terms: MoveTerms, phases: WorkerPhases) -> Proposal:
    shape, current = placed.shape, placed.placement
    candidate = plan_parts(
        shape, placed.hosts, loads, num_slots=placed.num_slots, previous=current, worker_phases=phases
    )
    shares: dict[Place, Mapping[str, float]] = {}
    for part in split_parts(list(candidate), loads, phases):
        own = {worker_id: candidate[worker_id] for worker_id in part.worker_ids}
        for place, held in _by_place(own, plan_rebalance_shares(shape, own, part.loads)).items():
            shares[place] = {**shares.get(place, {}), **held}
    return Proposal(
        candidate=candidate,
        shares=shares,
        worker_phases=phases,
        decision=decide_move(
            shape,
            loads,
            current=current,
            candidate=candidate,
            terms=terms,
            phases=(placed.worker_phases, phases),
        ),
        balance=_balance(placed, loads),
        phase_balance={
            phase: _balance(placed, {phase: of_phase}, phase=phase) for phase, of_phase in loads.items()
        },
    )


def _balance(placed: Placed, loads: PhaseLoads, phase: Phase | None = None) -> float:
    """Mean over most load of a worker, of those that take the rows of a phase, or of all."""
    num_slots = 1 + max(slot.slot_idx for slots in placed.placement.values() for slot in slots)
    load_LWs = []
    for part in split_parts(list(placed.placement), loads, placed.worker_phases):
        if phase is None or phase in {placed.worker_phases.get(w, phase) for w in part.worker_ids}:
            plan_LWX = plan_of(placed.shape, part.worker_ids, placed.placement, num_slots=num_slots)
            load_LWs.append(worker_loads(loads_of(placed.shape, part.loads), plan_LWX))
    return float(balance_of(np.concatenate(load_LWs, axis=1)).mean())


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
