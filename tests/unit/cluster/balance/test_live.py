"""Placements in, placements out: every expert held, kept ones in their slots, workers may come and go."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.live import domains_of, keep_slots, plan_rebalance, plan_rebalance_shares
from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement, slots_per_layer
from wire.errors import ConfigError
from workers.expert.types import Slot

SHAPE = ExpertShape(num_experts=8, layer_ids=(3, 4))


def hosts_named(*names: str) -> list[ExpertHost]:
    """One expert worker for each "zone/host"; its name is its id."""
    return [ExpertHost(worker_id=name, failure_domain=tuple(name.split("/"))) for name in names]


def skewed(seed: int, shape: ExpertShape = SHAPE) -> dict[int, np.ndarray]:
    draws = np.random.default_rng(seed)
    return {layer_idx: draws.lognormal(0, 1, shape.num_experts) * 1000 for layer_idx in shape.layer_ids}


def slot_of(placement: Placement) -> Mapping[tuple[str, int, int], int]:
    """(worker, layer, expert) -> its slot."""
    return {
        (worker_id, slot.layer_idx, slot.expert_idx): slot.slot_idx
        for worker_id, slots in placement.items()
        for slot in slots
    }


def check_placement(shape: ExpertShape, placement: Placement, *, num_slots: int) -> None:
    for slots in placement.values():
        assert len({(slot.layer_idx, slot.slot_idx) for slot in slots}) == len(slots)
        assert len({(slot.layer_idx, slot.expert_idx) for slot in slots}) == len(slots)
        assert all(0 <= slot.slot_idx < num_slots for slot in slots)
        assert list(slots) == sorted(slots)
    held = {slot.place for slots in placement.values() for slot in slots}
    assert held == {(layer, expert) for layer in shape.layer_ids for expert in range(shape.num_experts)}


NAMES = st.lists(
    st.builds("{}/{}".format, st.sampled_from("ab"), st.integers(0, 5)), min_size=1, max_size=6, unique=True
)


@settings(max_examples=60, deadline=None)
@given(old=NAMES, new=NAMES, seed=st.integers(0, 9), extra=st.integers(0, 3))
def test_every_expert_is_placed_when_workers_come_and_go(
    old: Sequence[str], new: Sequence[str], seed: int, extra: int
) -> None:
    previous = plan_placement(SHAPE, hosts_named(*old), num_slots=slots_per_layer(8, len(old), 0) + extra)
    num_slots = slots_per_layer(8, len(new), 0) + extra
    arguments = {"num_slots": num_slots, "previous": previous}
    placement = plan_rebalance(SHAPE, hosts_named(*new), skewed(seed), **arguments)
    check_placement(SHAPE, placement, num_slots=num_slots)
    assert list(placement) == list(new)
    assert placement == plan_rebalance(SHAPE, hosts_named(*new), skewed(seed), **arguments)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, seed=st.integers(0, 9), extra=st.integers(0, 3))
def test_expert_that_stays_on_a_worker_keeps_its_slot(names: Sequence[str], seed: int, extra: int) -> None:
    hosts, num_slots = hosts_named(*names), slots_per_layer(8, len(names), 0) + extra
    first = plan_rebalance(SHAPE, hosts, skewed(seed), num_slots=num_slots, previous={})
    second = plan_rebalance(SHAPE, hosts, skewed(seed + 1), num_slots=num_slots, previous=first)
    before, after = slot_of(first), slot_of(second)
    stayed = before.keys() & after.keys()
    assert {key: after[key] for key in stayed} == {key: before[key] for key in stayed}


def test_plans_for_the_same_loads_come_to_rest() -> None:
    hosts, loads = hosts_named("a/0", "a/1", "b/0", "b/1"), skewed(1)
    first = plan_rebalance(SHAPE, hosts, skewed(2), num_slots=3, previous={})
    second = plan_rebalance(SHAPE, hosts, loads, num_slots=3, previous=first)
    assert plan_rebalance(SHAPE, hosts, loads, num_slots=3, previous=second) == second


def test_hot_expert_gets_a_replica_in_the_other_zone() -> None:
    loads = {3: np.array([90.0, 10, 10, 10, 10, 10, 10, 10])}
    placement = plan_rebalance(
        SHAPE, hosts_named("a/0", "a/1", "b/0", "b/1"), loads, num_slots=3, previous={}
    )
    homes = [worker_id for worker_id in placement if (worker_id, 3, 0) in slot_of(placement)]
    assert {name[0] for name in homes} == {"a", "b"}


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expert\.num_slots"):
        plan_rebalance(SHAPE, hosts_named("a/0", "a/1"), {}, num_slots=3, previous={})


def test_domains_are_those_of_the_widest_level_that_differs() -> None:
    assert domains_of(hosts_named("a/0", "b/0", "a/1")).tolist() == [0, 1, 0]
    assert domains_of(hosts_named("a/0", "a/1", "a/0")).tolist() == [0, 1, 0]
    assert domains_of([ExpertHost(worker_id="x"), ExpertHost(worker_id="y")]).tolist() == [0, 1]


def test_kept_experts_stay_and_new_ones_fill_the_gaps() -> None:
    previous = np.array([[[4, 5, 6], [1, -1, 2]]])
    plan = np.array([[[6, 7, 4], [2, 3, 8]]])
    assert keep_slots(previous, plan).tolist() == [[[4, 7, 6], [3, 8, 2]]]


def test_shares_follow_the_placement_and_level_the_workers() -> None:
    # The worked example of shares.py: loads 6 and 4, worker 0 holds both experts, worker 1 the first.
    shape = ExpertShape(num_experts=2, layer_ids=(7,))
    placement = {"w0": (Slot(7, 0, 0), Slot(7, 1, 1)), "w1": (Slot(7, 0, 0),)}
    shares = plan_rebalance_shares(shape, placement, {7: np.array([6.0, 4.0])})
    assert shares["w0"] == pytest.approx((1 / 6, 1.0))
    assert shares["w1"] == pytest.approx((5 / 6,))
