"""Whether a better placement is worth its move.

Worked example: three layers whose most loaded workers carry 100, 100 and 50 rows, and 80, 70 and 50 with
the candidate: every layer waits for that worker, so a step's expert work falls from 250 to 200, a gain of
0.2. The move loads 6 GB at 0.1 GB/s, 60 s; the plan is expected to stay 300 s. Counting nothing while it is
under way, 0.2 * (1 - 60 / 300) = 0.16 is gained on average; with a least gain of 0.05 it moves.

Letters: E logical experts, L layers, W workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.balance.live import loads_of, plan_of
from cluster.balance.measure import count_replicas, worker_loads
from cluster.balance.moves import Change, MoveStep, changes_between, plan_steps
from cluster.balance.phases import WorkerPhases, split_parts
from cluster.balance.types import Floats
from cluster.balance.window import PhaseLoads
from cluster.placement import ExpertShape, Placement

Reason = Literal["needed", "gain", "nothing_to_move", "too_little", "too_slow"]


@dataclass(frozen=True, kw_only=True)
class MoveTerms:
    """What a move costs and what it must bring."""

    bytes_per_expert: int
    """Weights of one expert of one layer, > 0."""
    bytes_per_s: float
    """Weights that all workers together may load each second, > 0."""
    step_bytes: int
    """Most bytes of one step, > 0."""
    stay_s: float
    """Seconds until the next plan is likely to replace this one, > 0."""
    min_gain: float
    """Part of the expert work that a move must save, [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class MoveDecision:
    """To move or not, and how."""

    is_worth: bool
    reason: Reason
    """needed: the placement in force lacks experts or workers differ; gain: worth its cost."""
    gain: float
    """Part of the expert work that the candidate saves, once in force."""
    net_gain: float
    """The same over `stay_s`, with nothing saved while weights are on their way."""
    num_bytes: int
    transfer_s: float
    steps: tuple[MoveStep, ...]
    """Empty unless it is worth it; the last one's placement is the candidate."""


def decide_move(
    shape: ExpertShape,
    loads: PhaseLoads,
    *,
    current: Placement,
    candidate: Placement,
    terms: MoveTerms,
    phases: tuple[WorkerPhases, WorkerPhases] = ({}, {}),
) -> MoveDecision:
    """Gain over cost: whether to go from one placement to another, and in which steps.

    Args:
        shape: what is placed.
        loads: phase -> MoE layer index -> (E,) rows of each expert, >= 0; a layer left out counts as level.
        current: the placement in force.
        candidate: holds every expert.
        terms: what it costs and must bring.
        phases: which workers take the rows of which phase, now and with the candidate.
    """
    changes = changes_between(current, candidate, bytes_per_expert=terms.bytes_per_expert)
    num_bytes = sum(change.num_bytes for change in changes)
    transfer_s = num_bytes / terms.bytes_per_s
    before = _View.of(shape, loads, current, phases[0])
    after = _View.of(shape, loads, candidate, phases[1])
    gain = 1 - after.work / before.work if before.work > 0 else 0.0
    net_gain = gain * max(1 - transfer_s / terms.stay_s, 0.0)
    is_needed = set(current) != set(candidate) or not before.is_complete or bool(phases[0]) != bool(phases[1])
    is_same = not changes and phases[0] == phases[1]
    reason = _reason(is_same, is_needed, gain=gain, net_gain=net_gain, min_gain=terms.min_gain)
    is_worth = reason in ("needed", "gain")
    steps: tuple[MoveStep, ...] = ()
    if is_worth:
        steps = plan_steps(
            current,
            candidate,
            changes,
            gain_of=lambda change: _relief(change, before, after),
            step_bytes=terms.step_bytes,
        )
    return MoveDecision(
        is_worth=is_worth,
        reason=reason,
        gain=gain,
        net_gain=net_gain,
        num_bytes=num_bytes,
        transfer_s=transfer_s,
        steps=steps,
    )


def _reason(is_same: bool, is_needed: bool, *, gain: float, net_gain: float, min_gain: float) -> Reason:
    if is_same:
        return "nothing_to_move"
    if is_needed:
        return "needed"
    if net_gain > 0 and net_gain >= min_gain:
        return "gain"
    return "too_slow" if gain > 0 and gain >= min_gain else "too_little"


@dataclass(frozen=True, kw_only=True)
class _View:
    """A placement under some loads."""

    layer_to_idx: Mapping[int, int]
    worker_to_idx: Mapping[str, int]
    replica_LE_of: Mapping[str, Floats]
    """Worker id -> (L, E) load of one replica of every expert, of the rows that the worker takes."""
    load_LW: Floats
    """(L, W) rows of each worker."""
    is_complete: bool
    """Every expert has a replica among the workers that take the rows of a phase."""

    @classmethod
    def of(
        cls, shape: ExpertShape, loads: PhaseLoads, placement: Placement, worker_phases: WorkerPhases
    ) -> "_View":
        """The view of a placement."""
        num_slots = 1 + max((slot.slot_idx for slots in placement.values() for slot in slots), default=0)
        replica_LE_of: dict[str, Floats] = {}
        load_LWs = []
        is_complete = True
        for part in split_parts(list(placement), loads, worker_phases):
            plan_LWX = plan_of(shape, part.worker_ids, placement, num_slots=num_slots)
            loads_LE = loads_of(shape, part.loads)
            count_LE = count_replicas(plan_LWX, shape.num_experts)
            replica_LE_of.update(dict.fromkeys(part.worker_ids, loads_LE / np.maximum(count_LE, 1)))
            load_LWs.append(worker_loads(loads_LE, plan_LWX))
            is_complete &= bool((count_LE > 0).all())
        return cls(
            layer_to_idx={layer_idx: idx for idx, layer_idx in enumerate(shape.layer_ids)},
            worker_to_idx={worker_id: idx for idx, worker_id in enumerate(replica_LE_of)},
            replica_LE_of=replica_LE_of,
            load_LW=np.concatenate(load_LWs, axis=1),
            is_complete=is_complete,
        )

    @property
    def work(self) -> float:
        """Rows of the most loaded worker, over all layers: what a step of the whole model waits for."""
        return float(self.load_LW.max(axis=1, initial=0.0).sum())


def _relief(change: Change, before: _View, after: _View) -> float:
    """How much a change by itself levels its layer: the load it takes off, times its worker's excess."""
    layer = before.layer_to_idx[change.layer_idx]
    load_W = before.load_LW[layer]
    worker = before.worker_to_idx.get(change.worker_id)
    above = (load_W[worker] if worker is not None else 0.0) - load_W.mean()
    replica_LE = after.replica_LE_of.get(change.worker_id)
    taken, given = (
        0.0 if expert_idx is None or replica_LE is None else float(replica_LE[layer, expert_idx])
        for expert_idx in (change.old_expert_idx, change.new_expert_idx)
    )
    return float(above * (taken - given))
