"""From who holds what to a routing table: copies with slots and shares. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.balance.phases import WorkerPhases
from cluster.placement import ExpertShape
from router.experts.table import Replica, RoutingTable, build_table
from workers.expert.types import Place


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy of an expert in a table."""

    worker_id: str
    slot_idx: int
    share: float
    """Part of the expert's rows, (0, 1]."""


Copies = Mapping[Place, tuple[Copy, ...]]
Shares = Mapping[Place, Mapping[str, float]]
"""Place -> worker -> share of the expert's rows; what is not named is shared evenly."""


def weigh_copies(
    holders: Mapping[Place, tuple[str, ...]], *, slots: Mapping[str, Mapping[Place, int]], shares: Shares
) -> Copies:
    """Every holder with its slot and its share.

    The shares planned hold where they are planned for all holders of an expert; otherwise all get the same.
    """
    copies = {}
    for place, workers in holders.items():
        planned = shares.get(place, {})
        weights = [planned.get(worker_id, 0.0) for worker_id in workers]
        if min(weights) <= 0:
            weights = [1.0] * len(workers)
        total = sum(weights)
        copies[place] = tuple(
            Copy(worker_id=worker_id, slot_idx=slots[worker_id][place], share=weight / total)
            for worker_id, weight in zip(workers, weights, strict=True)
        )
    return copies


def build_routes(
    copies: Copies, shape: ExpertShape, *, version: int, worker_phases: WorkerPhases | None = None
) -> RoutingTable:
    """The checked table of these copies.

    Args:
        copies: of every expert.
        shape: what they are copies of.
        version: of the table.
        worker_phases: whose rows each worker takes; None = all take the rows of both phases.

    Raises:
        StaleTable: an expert has no copy.
    """
    named = {copy.worker_id for held in copies.values() for copy in held}
    worker_ids = sorted(named, key=lambda worker_id: (len(worker_id), worker_id))
    idx_of = {worker_id: idx for idx, worker_id in enumerate(worker_ids)}
    layers: dict[int, list[Replica]] = {layer_idx: [] for layer_idx in shape.layer_ids}
    for (layer_idx, expert_idx), held in sorted(copies.items()):
        layers[layer_idx] += [
            Replica(
                expert_idx=expert_idx,
                worker_idx=idx_of[copy.worker_id],
                slot_idx=copy.slot_idx,
                share=copy.share,
            )
            for copy in held
        ]
    return build_table(
        version=version,
        num_experts=shape.num_experts,
        worker_ids=worker_ids,
        layers=layers,
        worker_phases={w: phase for w, phase in (worker_phases or {}).items() if w in idx_of},
    )
