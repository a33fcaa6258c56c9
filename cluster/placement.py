"""Placement: which expert worker holds which experts. A pure decision.

Worked example: 4 experts, 2 workers of 3 slots, layer 0. Worker 0 gets experts 0 and 1, worker 1 gets 2 and
3; the two slots left hold second replicas of the other's experts: worker 1 also 0, worker 0 also 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
