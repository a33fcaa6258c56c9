"""Two placements over one fleet, as arrays: each phase's on workers of its own. Pure.

Worked example: prefill has loads 6 and 2, decode 2 and 6, on two workers of two slots: each worker holds both
experts, worker 0 takes the rows of prefill and worker 1 those of decode.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.balance.homes import plan_homes
from cluster.balance.phases import least_workers, plan_phases
from cluster.balance.types import Fleet, Floats, Ints
from cluster.placement import ExpertHost
from wire.errors import ConfigError
from wire.phases import PHASES, Phase


@dataclass(frozen=True, kw_only=True)
class ApartPlan:
    """What is in every slot, and whose rows each worker takes."""

    plan_LWX: Ints
    phases: tuple[Phase, ...]
    """Of each worker."""

    def workers_of(self, phase: Phase) -> Ints:
        """Indices of the workers that take the rows of a phase."""
        return np.flatnonzero(np.array(self.phases) == phase)


def plan_apart(
    loads: Mapping[Phase, Floats],
    fleet: Fleet,
    *,
    previous_LWX: Ints | None = None,
    previous_phases: Sequence[Phase] = (),
) -> ApartPlan:
    """A placement for each phase, on a part of the workers in proportion to its load.

    Args:
        loads: phase -> (L, E) load of every expert, >= 0.
        fleet: all workers.
        previous_LWX: (L, W, X) the plan in force; few copies move from it. None for none.
        previous_phases: of its workers; empty where they took the rows of both.

    Raises:
        ConfigError: the slots do not hold every expert twice, in workers of one phase each.
    """
    num_experts = loads["prefill"].shape[1]
    hosts = [
        ExpertHost(worker_id=str(worker), failure_domain=(str(domain),))
        for worker, domain in enumerate(fleet.domain_W.tolist())
    ]
    least = least_workers(num_experts, fleet.num_slots)
    known = {str(worker): phase for worker, phase in enumerate(previous_phases)}
    # Where nothing has any load, the parts are equal.
    totals = {phase: {0: loads[phase].sum(axis=1) + np.finfo(np.float64).tiny} for phase in PHASES}
    of_worker = plan_phases(hosts, totals, least=least, previous=known)
    if not of_worker:
        wanted = f"{least} workers for each phase, or slots with which fewer hold {num_experts} experts"
        raise ConfigError(field="--workers", wanted=wanted, given=str(fleet.num_workers))
    phases = tuple(of_worker[host.worker_id] for host in hosts)
    plan = ApartPlan(plan_LWX=_no_plan(loads, fleet), phases=phases)
    for phase in PHASES:
        own_W = plan.workers_of(phase)
        part = Fleet(
            num_slots=fleet.num_slots, domain_W=np.unique(fleet.domain_W[own_W], return_inverse=True)[1]
        )
        previous = None if previous_LWX is None else previous_LWX[:, own_W]
        plan.plan_LWX[:, own_W] = plan_homes(loads[phase], part, previous_LWX=previous)
    return plan


def _no_plan(loads: Mapping[Phase, Floats], fleet: Fleet) -> Ints:
    return np.zeros((len(loads["prefill"]), fleet.num_workers, fleet.num_slots), dtype=np.int64)
