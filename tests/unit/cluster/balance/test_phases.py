"""A placement for each phase: parts in proportion, whole, spread over domains, and seldom changed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.balance.phases import least_workers, plan_parts, plan_phases, split_parts
from cluster.balance.window import PhaseLoads
from cluster.placement import ExpertHost, ExpertShape, plan_placement
from wire.phases import PHASES, Phase

SHAPE = ExpertShape(num_experts=8, layer_ids=(1, 2))


def hosts(num_workers: int, *, num_zones: int = 1) -> list[ExpertHost]:
    return [
        ExpertHost(worker_id=f"w{i}", failure_domain=(f"zone-{i % num_zones}", f"host-{i}"))
        for i in range(num_workers)
    ]


def rows(prefill: float, decode: float) -> PhaseLoads:
    """So many rows of each phase, all of one expert."""
    return {"prefill": {1: np.array([prefill])}, "decode": {1: np.array([decode])}}


def apart(phases: str) -> dict[str, Phase]:
    """pd = w0 takes prefill, w1 decode."""
    return {f"w{i}": "prefill" if phase == "p" else "decode" for i, phase in enumerate(phases)}


def test_worked_example() -> None:
    first = plan_phases(hosts(4), rows(30, 10), least=1, previous={})
    assert Counter(first.values()) == {"prefill": 3, "decode": 1}
    then = plan_phases(hosts(4), rows(20, 20), least=1, previous=first)
    assert Counter(then.values()) == {"prefill": 2, "decode": 2}
    assert sum(first[worker] != then[worker] for worker in first) == 1


@pytest.mark.parametrize(
    ("num_workers", "least", "known"),
    [(3, 2, rows(1, 1)), (1, 1, rows(1, 1)), (4, None, rows(1, 1)), (4, 1, rows(0, 0)), (4, 1, {})],
    ids=["too few slots", "one worker", "just enough slots", "no rows yet", "no layer yet"],
)
def test_phases_stay_together_where_they_cannot_be_apart(
    num_workers: int, least: int | None, known: PhaseLoads
) -> None:
    assert plan_phases(hosts(num_workers), known, least=least, previous={}) == {}


def test_split_stays_for_little_gain_and_without_load() -> None:
    before = apart("pppd")
    assert plan_phases(hosts(4), rows(26, 10), least=1, previous=before) == before
    assert plan_phases(hosts(4), rows(0, 0), least=1, previous=before) == before


def test_worker_that_comes_takes_what_is_short_and_one_that_left_is_replaced() -> None:
    before = apart("ppd")
    assert plan_phases(hosts(4), rows(20, 20), least=1, previous=before) == apart("ppdd")
    assert plan_phases(hosts(3)[:2], rows(20, 20), least=1, previous=before) == apart("pd")


def test_both_phases_are_in_every_zone() -> None:
    phases = plan_phases(hosts(6, num_zones=3), rows(1, 1), least=1, previous={})
    assert all({phases[f"w{i}"], phases[f"w{i + 3}"]} == set(PHASES) for i in range(3))


@given(
    num_workers=st.integers(1, 9),
    least=st.integers(1, 4),
    numbers=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    before=st.text("pd", max_size=12),
)
def test_each_part_is_large_enough_for_every_expert(
    num_workers: int, least: int, numbers: tuple[int, int], before: str
) -> None:
    phases = plan_phases(hosts(num_workers), rows(*numbers), least=least, previous=apart(before))
    num_of = Counter(phases.values())
    if phases:
        assert set(phases) == {f"w{i}" for i in range(num_workers)}
        assert min(num_of[phase] for phase in PHASES) >= least
    else:
        assert num_workers < 2 * least or not (before or any(numbers))


@given(
    split=st.text("pd", min_size=4, max_size=6).filter(lambda text: 1 < text.count("p") < len(text) - 1),
    num_slots=st.integers(4, 8),
    seed=st.integers(0, 1000),
)
def test_each_part_holds_every_expert_and_is_planned_for_its_own_rows(
    split: str, num_slots: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    loads: PhaseLoads = {
        phase: {layer_idx: rng.lognormal(size=8) for layer_idx in SHAPE.layer_ids} for phase in PHASES
    }
    previous = plan_placement(SHAPE, hosts(len(split)), num_slots=num_slots)
    placement = plan_parts(
        SHAPE,
        hosts(len(split)),
        loads,
        num_slots=num_slots,
        previous=previous,
        worker_phases=apart(split),
    )
    assert list(placement) == [f"w{i}" for i in range(len(split))]
    for part in split_parts(list(placement), loads, apart(split)):
        held = {slot.place for worker_id in part.worker_ids for slot in placement[worker_id]}
        assert held == {(layer_idx, expert) for layer_idx in SHAPE.layer_ids for expert in range(8)}
        assert any(part.loads is loads[phase] for phase in PHASES)


def test_workers_that_hold_every_expert_are_as_many_as_their_slots_ask_for() -> None:
    assert [least_workers(8, num_slots) for num_slots in (0, 3, 4, 8, 9)] == [None, 3, 2, 1, 1]
