"""Placement: which expert worker holds which experts. A pure decision.

Worked example: 4 experts, 2 workers of 3 slots, layer 0. Worker 0 gets experts 0 and 1, worker 1 gets 2 and
3; the two slots left hold second replicas of the other's experts: worker 1 also 0, worker 0 also 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.experts.table import Replica, RoutingTable, build_table
from wire.errors import ConfigError
from workers.expert.types import Slot


@dataclass(frozen=True, kw_only=True)
class ExpertHost:
    """An expert worker as the placement sees it."""

    worker_id: str
    failure_domain: tuple[str, ...] = ()
    """Zone, rack, host; what shares a longer prefix fails together more often."""


Placement = Mapping[str, tuple[Slot, ...]]
"""Worker id -> its slots, in order."""


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """What there is to place."""

    num_experts: int
    layer_ids: tuple[int, ...]
    """MoE layers, the MTP layer included."""


def slots_per_layer(num_experts: int, num_workers: int, num_slots: int) -> int:
    """Slots of each worker in each layer; 0 asks for just enough.

    Raises:
        ConfigError: the slots of all workers do not hold every expert once.
    """
    enough = -(-num_experts // num_workers)
    if num_slots and num_slots < enough:
        wanted = f"at least {enough}: {num_workers} workers must hold {num_experts} experts in every layer"
        raise ConfigError(field="expert.num_slots", wanted=wanted, given=str(num_slots))
    return num_slots or enough


def plan_placement(shape: ExpertShape, hosts: Sequence[ExpertHost], *, num_slots: int = 0) -> Placement:
    """Every expert once, in contiguous blocks (groups stay together); slots left over hold second replicas.

    A replica goes to another failure domain than the copies that exist, where there is one.

    Raises:
        ConfigError: too few slots.
    """
    per_layer = slots_per_layer(shape.num_experts, len(hosts), num_slots)
    slots: dict[str, list[Slot]] = {host.worker_id: [] for host in hosts}
    for layer_idx in shape.layer_ids:
        held = _plan_layer(shape.num_experts, hosts, per_layer, first_extra=layer_idx)
        for host in hosts:
            experts = held[host.worker_id]
            slots[host.worker_id] += [Slot(layer_idx, slot, expert) for slot, expert in enumerate(experts)]
    return {worker_id: tuple(placed) for worker_id, placed in slots.items()}


def _plan_layer(
    num_experts: int, hosts: Sequence[ExpertHost], per_layer: int, first_extra: int
) -> dict[str, list[int]]:
    bounds = [num_experts * i // len(hosts) for i in range(len(hosts) + 1)]
    held = {
        host.worker_id: list(range(begin, end))
        for host, begin, end in zip(hosts, bounds[:-1], bounds[1:], strict=True)
    }
    # Another expert begins in every layer, so that the same few are not doubled everywhere.
    order = [(first_extra + i) % num_experts for i in range(num_experts)]
    for expert in order:
        homes = [host for host in hosts if expert in held[host.worker_id]]
        open_hosts = [host for host in hosts if len(held[host.worker_id]) < per_layer and host not in homes]
        if open_hosts:
            held[_farthest(open_hosts, homes, held)].append(expert)
    return held


def _farthest(
    open_hosts: Sequence[ExpertHost], homes: Sequence[ExpertHost], held: Mapping[str, Sequence[int]]
) -> str:
    """The worker that shares least with an expert's homes; among equals the emptiest."""
    best = min(open_hosts, key=lambda host: (_closeness(host, homes), len(held[host.worker_id])))
    return best.worker_id


def _closeness(host: ExpertHost, homes: Sequence[ExpertHost]) -> int:
    """Longest prefix of its failure domain that a host shares with one of `homes`."""
    return max(_shared_depth(host.failure_domain, home.failure_domain) for home in homes)


def _shared_depth(ours: tuple[str, ...], theirs: tuple[str, ...]) -> int:
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    return same.index(False) if False in same else len(same)


def table_of(
    placement: Placement, shape: ExpertShape, *, version: int, live: Sequence[str]
) -> RoutingTable | None:
    """The routing table over the live workers of a placement; None while an expert has no live replica.

    Args:
        placement: slots of every worker.
        shape: what must be covered.
        version: of the new table.
        live: workers that have loaded their slots.
    """
    workers = [worker_id for worker_id in placement if worker_id in live]
    homes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for worker_idx, worker_id in enumerate(workers):
        for slot in placement[worker_id]:
            homes.setdefault((slot.layer_idx, slot.expert_idx), []).append((worker_idx, slot.slot_idx))
    if len(homes) < len(shape.layer_ids) * shape.num_experts:
        return None
    layers: dict[int, list[Replica]] = {layer_idx: [] for layer_idx in shape.layer_ids}
    for (layer_idx, expert_idx), copies in sorted(homes.items()):
        for worker_idx, slot_idx in copies:
            replica = Replica(
                expert_idx=expert_idx, worker_idx=worker_idx, slot_idx=slot_idx, share=1 / len(copies)
            )
            layers[layer_idx].append(replica)
    return build_table(version=version, num_experts=shape.num_experts, worker_ids=workers, layers=layers)
