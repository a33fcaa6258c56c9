"""The routing table: for each MoE layer and expert, the replicas that hold it.

Glossary, with numbers: a model with 4 *logical experts* on 2 workers of 3 *slots* a layer has 6 slots, so two
experts get a second *replica*. Replica (worker 1, slot 2, share 0.5) takes half of its expert's rows.
A table is immutable and has a version; it is checked when it is built, so that every dispatch finds a home.

A table can give each phase a placement of its own: every worker then takes the rows of one phase, and the
other's only where its workers have no copy that can be reached. With experts 0 and 1 on worker 0, which takes
prefill, and on worker 1, which takes decode, all rows of a step of decode go to worker 1; without it to
worker 0.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import cast

import numpy as np
import numpy.typing as npt

from wire.errors import StaleTable
from wire.phases import PHASES, Phase
from wire.proto import control_pb2

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Int16 = npt.NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One copy of an expert."""

    expert_idx: int
    worker_idx: int
    """Index into `RoutingTable.worker_ids`."""
    slot_idx: int
    share: float
    """Part of the expert's rows that this copy takes, (0, 1]; the shares of an expert sum to 1."""


@dataclass(frozen=True)
class LayerRoutes:
    """The replicas of one layer, as arrays to look up many rows at once; M = most replicas of any expert."""

    replicas: tuple[Replica, ...]
    """With their shares among all copies, also where the routes are those of one phase."""
    worker_EM: Ints
    """(E, M) worker index of each replica, padded with the last one."""
    threshold_E: tuple[tuple[float, ...], ...]
    """For each expert the upper ends of its replicas' intervals of [0, 1), but the last one's, which is 1."""
    home_E: Int16
    """(E,) worker index of each expert's first replica."""
    copies_E: tuple[tuple[int, ...], ...]
    """For each expert the workers that hold it."""
    spare: "LayerRoutes | None" = None
    """Of a phase's routes: the copies of all workers, for when its own cannot be reached."""

    @property
    def is_single(self) -> bool:
        """Whether every expert has one replica only."""
        return bool(self.worker_EM.shape[1] == 1)

    def copies_of(self, expert_idx: int, *, row_idx: int) -> tuple[int, ...]:
        """The workers that hold an expert, first the one that the shares choose for a row.

        A row's point in [0, 1) is the fractional part of row * golden ratio: spread evenly over any run of
        rows. With shares 0.5 and 0.5, rows 0, 1, 2, 3 have the points 0.00, 0.62, 0.24, 0.85 and begin with
        the replicas 0, 1, 0, 1.
        """
        copies = self.copies_E[expert_idx]
        if len(copies) == 1:
            return copies
        point = row_idx * _GOLDEN % 1.0
        first = bisect_right(self.threshold_E[expert_idx], point)
        return copies[first:] + copies[:first]


_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class RoutingTable:
    """An immutable snapshot of where every expert lives."""

    version: int
    num_experts: int
    worker_ids: tuple[str, ...]
    layers: Mapping[int, LayerRoutes]
    """MoE layer index -> its routes, over all workers."""
    worker_phases: Mapping[str, Phase] = field(default_factory=dict)
    """Worker -> the phase whose rows it takes; empty = all take the rows of both."""
    phase_layers: Mapping[Phase, Mapping[int, LayerRoutes]] = field(default_factory=dict)
    """Phase -> MoE layer index -> the routes of its rows; empty = those of all workers."""

    def routes(self, layer_idx: int, phase: Phase | None = None) -> LayerRoutes:
        """The routes of one layer, for rows of a phase; None = over all workers.

        Raises:
            StaleTable: the table does not know the layer.
        """
        layers = self.phase_layers.get(phase, self.layers) if phase else self.layers
        if layer_idx not in layers:
            raise StaleTable(
                f"routing table {self.version} has no layer {layer_idx}; it has {list(self.layers)}"
            )
        return layers[layer_idx]


def build_table(
    *,
    version: int,
    num_experts: int,
    worker_ids: Sequence[str],
    layers: Mapping[int, Sequence[Replica]],
    worker_phases: Mapping[str, Phase] | None = None,
) -> RoutingTable:
    """A checked table.

    Raises:
        StaleTable: an expert has no replica, its shares do not sum to 1, or a worker, expert or phase is
            unknown.
    """
    worker_phases = worker_phases or {}
    if unknown := set(worker_phases.values()) - set(PHASES):
        raise StaleTable(f"workers take rows of {sorted(unknown)}; known: {PHASES}")
    routes = {
        layer_idx: _build_layer(
            replicas, num_experts=num_experts, num_workers=len(worker_ids), layer_idx=layer_idx
        )
        for layer_idx, replicas in sorted(layers.items())
    }
    workers_of = {
        phase: {idx for idx, worker_id in enumerate(worker_ids) if worker_phases.get(worker_id) == phase}
        for phase in (PHASES if worker_phases else ())
    }
    return RoutingTable(
        version=version,
        num_experts=num_experts,
        worker_ids=tuple(worker_ids),
        layers=MappingProxyType(routes),
        worker_phases=MappingProxyType(dict(worker_phases)),
        phase_layers={
            phase: {layer_idx: _only_of(of_all, worker_idxs) for layer_idx, of_all in routes.items()}
            for phase, worker_idxs in workers_of.items()
        },
    )


def _only_of(routes: LayerRoutes, worker_idxs: AbstractSet[int]) -> LayerRoutes:
    """The routes of rows that these workers take; an expert that none of them holds keeps all its copies."""
    by_expert: list[list[Replica]] = []
    for copies in _by_expert(routes.replicas, num_experts=len(routes.copies_E)):
        by_expert.append([copy for copy in copies if copy.worker_idx in worker_idxs] or copies)
    return replace(_lay_out(by_expert), spare=routes)


def _build_layer(
    replicas: Sequence[Replica], num_experts: int, num_workers: int, layer_idx: int
) -> LayerRoutes:
    for replica in replicas:
        if not (0 <= replica.expert_idx < num_experts and 0 <= replica.worker_idx < num_workers):
            raise StaleTable(
                f"layer {layer_idx}: {replica} is outside {num_experts} experts, {num_workers} workers"
            )
    by_expert = _by_expert(replicas, num_experts=num_experts)
    for expert_idx, copies in enumerate(by_expert):
        total = sum(copy.share for copy in copies)
        if not copies or abs(total - 1.0) > 1e-6 or min(copy.share for copy in copies) <= 0:
            raise StaleTable(
                f"layer {layer_idx}, expert {expert_idx}: {len(copies)} replicas, shares sum to {total}; "
                "wanted at least one, shares > 0, sum 1"
            )
    return replace(_lay_out(by_expert), replicas=tuple(replicas))


def _by_expert(replicas: Sequence[Replica], *, num_experts: int) -> list[list[Replica]]:
    by_expert: list[list[Replica]] = [[] for _ in range(num_experts)]
    for replica in replicas:
        by_expert[replica.expert_idx].append(replica)
    return by_expert


def _lay_out(by_expert: Sequence[Sequence[Replica]]) -> LayerRoutes:
    """The arrays of a layer's replicas, given by expert; an expert's shares count in proportion."""
    most = max(len(copies) for copies in by_expert)
    copies_E = tuple(tuple(copy.worker_idx for copy in copies) for copies in by_expert)
    return LayerRoutes(
        replicas=tuple(copy for copies in by_expert for copy in copies),
        worker_EM=np.array([held + held[-1:] * (most - len(held)) for held in copies_E], dtype=np.int64),
        threshold_E=tuple(_thresholds_of(copies) for copies in by_expert),
        home_E=np.array([held[0] for held in copies_E], dtype=np.int16),
        copies_E=copies_E,
    )


def _thresholds_of(copies: Sequence[Replica]) -> tuple[float, ...]:
    upper = np.cumsum([copy.share for copy in copies])
    return tuple((upper[:-1] / upper[-1]).tolist())


def table_to_proto(table: RoutingTable) -> control_pb2.RoutingTable:
    """The table as it travels."""
    message = control_pb2.RoutingTable(
        version=table.version,
        num_experts=table.num_experts,
        worker_ids=table.worker_ids,
        worker_phases=table.worker_phases,
    )
    for layer_idx, routes in table.layers.items():
        layer = message.layers.add(layer_idx=layer_idx)
        for replica in routes.replicas:
            layer.expert_idx.append(replica.expert_idx)
            layer.worker_idx.append(replica.worker_idx)
            layer.slot_idx.append(replica.slot_idx)
            layer.share.append(replica.share)
    return message


def table_from_proto(message: control_pb2.RoutingTable) -> RoutingTable:
    """The table that a controller published, checked again.

    Raises:
        StaleTable: the message is not a complete table.
    """
    layers = {
        layer.layer_idx: [
            Replica(expert_idx=expert, worker_idx=worker, slot_idx=slot, share=share)
            for expert, worker, slot, share in zip(
                layer.expert_idx, layer.worker_idx, layer.slot_idx, layer.share, strict=True
            )
        ]
        for layer in message.layers
    }
    return build_table(
        version=message.version,
        num_experts=message.num_experts,
        worker_ids=message.worker_ids,
        layers=layers,
        worker_phases=cast("dict[str, Phase]", dict(message.worker_phases)),
    )
