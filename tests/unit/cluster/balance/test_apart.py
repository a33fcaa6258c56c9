"""Two placements over one fleet: each phase has workers that hold every expert, in every domain."""

import numpy as np
import pytest

from cluster.balance.apart import plan_apart
from cluster.balance.measure import balance_of, count_replicas, worker_loads
from cluster.balance.types import EMPTY, Fleet, Floats
from wire.errors import ConfigError
from wire.phases import PHASES, Phase


def fleet(num_workers: int, num_slots: int, num_nodes: int = 1) -> Fleet:
    return Fleet(num_slots=num_slots, domain_W=np.arange(num_workers) * num_nodes // num_workers)


def loads(seed: int, *, prefill: float = 1.0) -> dict[Phase, Floats]:
    rng = np.random.default_rng(seed)
    return {phase: rng.lognormal(size=(2, 8)) * (prefill if phase == "prefill" else 1.0) for phase in PHASES}


def test_worked_example() -> None:
    given: dict[Phase, Floats] = {"prefill": np.array([[6.0, 2.0]]), "decode": np.array([[2.0, 6.0]])}
    plan = plan_apart(given, fleet(2, 2))
    assert plan.phases == ("prefill", "decode")
    assert sorted(plan.plan_LWX[0, 0]) == sorted(plan.plan_LWX[0, 1]) == [0, 1]


@pytest.mark.parametrize(("prefill", "num_prefill"), [(1.0, 4), (3.0, 6), (1e6, 6), (1e-6, 2), (0.0, 2)])
def test_parts_are_in_proportion_hold_every_expert_and_stand_on_every_node(
    prefill: float, num_prefill: int
) -> None:
    given = loads(0, prefill=prefill)
    given["decode"] *= given["prefill"].sum() / given["decode"].sum() / prefill if prefill else 1.0
    plan = plan_apart(given, fleet(8, 4, num_nodes=2))
    assert plan.phases.count("prefill") == num_prefill
    for phase in PHASES:
        own = plan.workers_of(phase)
        part = plan.plan_LWX[:, own]
        assert (part != EMPTY).all()
        assert (count_replicas(part, 8) > 0).all()
        assert {worker // 4 for worker in own.tolist()} == {0, 1}
        assert balance_of(worker_loads(given[phase], part)).min() > 0.5


def test_plan_in_force_is_followed() -> None:
    first = plan_apart(loads(0), fleet(8, 4))
    again = plan_apart(loads(0), fleet(8, 4), previous_LWX=first.plan_LWX, previous_phases=first.phases)
    assert again.phases == first.phases
    assert (again.plan_LWX == first.plan_LWX).mean() > 0.9


def test_too_few_slots_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'--workers': wanted 3 workers for each phase.*got 5"):
        plan_apart(loads(0), fleet(5, 3))
