"""A placement for each phase: which workers take the rows of which, and the loads of each part. Pure.

Prefill and decode choose different experts, and a call of few decoded tokens waits behind one of a prompt's
many. So the workers are split in two in proportion to the rows, and each part holds every expert for the rows
of one phase.

Worked example: 30 rows of prefill and 10 of decode on 4 workers, each with room for every expert: 3 take
prefill and 1 takes decode, 10 rows each. With 20 and 20 rows later, 2 and 2 workers have 10 each where one
had 20: half of the busiest worker's rows go, so one worker changes sides.

Letters: E logical experts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.balance.live import domains_of, plan_rebalance
from cluster.balance.window import Loads, PhaseLoads, total_of
from cluster.placement import ExpertHost, ExpertShape, Placement
from wire.phases import PHASES, Phase

WorkerPhases = Mapping[str, Phase]
"""Worker id -> the phase whose rows it takes; empty = all take the rows of both."""

REGROUP_GAIN = 0.1
"""Part of the busiest workers' rows that another split must save, or no worker changes sides."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Workers that take the same rows."""

    worker_ids: tuple[str, ...]
    loads: Loads


def split_parts(
    worker_ids: Sequence[str], loads: PhaseLoads, worker_phases: WorkerPhases
) -> tuple[Part, ...]:
    """The parts of a placement with what each is asked for; one of all workers where phases are not apart."""
    if not worker_phases:
        return (Part(worker_ids=tuple(worker_ids), loads=total_of(loads)),)
    return tuple(
        Part(
            worker_ids=tuple(worker for worker in worker_ids if worker_phases.get(worker) == phase),
            loads=loads.get(phase, {}),
        )
        for phase in PHASES
    )


def plan_parts(
    shape: ExpertShape,
    hosts: Sequence[ExpertHost],
    loads: PhaseLoads,
    *,
    num_slots: int,
    previous: Placement,
    worker_phases: WorkerPhases,
) -> Placement:
    """The next placement of all workers, each part level under its own rows; see `plan_rebalance`.

    Raises:
        ConfigError: too few slots.
    """
    host_of = {host.worker_id: host for host in hosts}
    planned: dict[str, Placement] = {}
    for part in split_parts(list(host_of), loads, worker_phases):
        own = [host_of[worker_id] for worker_id in part.worker_ids]
        placement = plan_rebalance(shape, own, part.loads, num_slots=num_slots, previous=previous)
        planned.update(dict.fromkeys(part.worker_ids, placement))
    return {worker_id: planned[worker_id][worker_id] for worker_id in host_of}


def least_workers(num_experts: int, num_slots: int) -> int | None:
    """Workers that hold every expert between them; None where slots are just enough for one placement."""
    return -(-num_experts // num_slots) if num_slots else None


def plan_phases(
    hosts: Sequence[ExpertHost], loads: PhaseLoads, *, least: int | None, previous: WorkerPhases
) -> WorkerPhases:
    """Which workers take the rows of which phase; few change sides.

    Args:
        hosts: the workers, in the order of the placement.
        loads: rows of each phase.
        least: workers that a phase needs to hold every expert, see `least_workers`.
        previous: the split in force; may name other workers than `hosts`.

    Returns:
        Empty where there are too few workers for two placements, or nothing is known of the load yet.
    """
    rows = {phase: _num_rows(loads.get(phase, {})) for phase in PHASES}
    if least is None or len(hosts) < 2 * least or not (previous or any(rows.values())):
        return {}
    known = {host.worker_id: previous[host.worker_id] for host in hosts if host.worker_id in previous}
    num_now = Counter(known.values())
    is_whole = len(known) == len(hosts) and min(num_now[phase] for phase in PHASES) >= least
    num_prefill = min(
        range(least, len(hosts) - least + 1),
        key=lambda num: (_busiest(rows, num, len(hosts) - num), abs(len(hosts) - 2 * num)),
    )
    best = _busiest(rows, num_prefill, len(hosts) - num_prefill)
    if is_whole and best >= _busiest(rows, num_now["prefill"], num_now["decode"]) * (1 - REGROUP_GAIN):
        return known
    return _assign(hosts, num_prefill, known)


def _num_rows(loads: Loads) -> float:
    return float(sum(rows_E.sum() for rows_E in loads.values()))


def _busiest(rows: Mapping[Phase, float], num_prefill: int, num_decode: int) -> float:
    """Rows of a worker on the busier side."""
    return max(rows["prefill"] / num_prefill, rows["decode"] / num_decode)


def _assign(hosts: Sequence[ExpertHost], num_prefill: int, known: WorkerPhases) -> WorkerPhases:
    """So many workers for prefill: first those that are, then new ones; spread over the failure domains."""
    domain_of = dict(zip((host.worker_id for host in hosts), domains_of(hosts).tolist(), strict=True))
    rank = {"prefill": 0, "decode": 2}
    chosen: list[str] = []
    for _ in range(num_prefill):
        taken = Counter(domain_of[worker_id] for worker_id in chosen)
        chosen.append(
            min(
                (host.worker_id for host in hosts if host.worker_id not in chosen),
                key=lambda worker_id: (rank.get(known.get(worker_id, ""), 1), taken[domain_of[worker_id]]),
            )
        )
    return {host.worker_id: "prefill" if host.worker_id in chosen else "decode" for host in hosts}
