"""Placement and the routing table over it: every expert held, never twice by one worker, far apart."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    ExpertHost,
    ExpertShape,
    Placement,
    Slot,
    plan_placement,
    slots_per_layer,
)
from router.experts.table import RoutingTable
from wire.errors import ConfigError

SHAPE = ExpertShape(num_experts=4, layer_ids=(0,))


def hosts_in(*domains: str) -> list[ExpertHost]:
    """One expert worker for each "zone/rack/host"."""
    return [
        ExpertHost(worker_id=f"expert-{i}", failure_domain=tuple(domain.split("/")))
        for i, domain in enumerate(domains)
    ]


def experts_of(placement: Placement, worker_id: str, layer_idx: int = 0) -> list[int]:
    return [slot.expert_idx for slot in placement[worker_id] if slot.layer_idx == layer_idx]


def homes_of(placement: Placement, layer_idx: int, expert_idx: int) -> list[str]:
    return [worker for worker in placement if expert_idx in experts_of(placement, worker, layer_idx)]


def workers_of(table: RoutingTable, layer_idx: int, expert_idx: int) -> dict[str, float]:
    """Worker -> share, of one expert."""
    return {
        table.worker_ids[replica.worker_idx]: replica.share
        for replica in table.routes(layer_idx).replicas
        if replica.expert_idx == expert_idx
    }


DOMAINS = st.builds(
    lambda zone, rack, host: f"{zone}/{rack}/{host}",
    st.sampled_from("ab"),
    st.sampled_from("xy"),
    st.sampled_from("123"),
)
HOSTS = st.lists(DOMAINS, min_size=1, max_size=6).map(lambda domains: hosts_in(*domains))
SHAPES = st.builds(
    lambda num_experts, layer_ids: ExpertShape(num_experts=num_experts, layer_ids=tuple(sorted(layer_ids))),
    st.integers(1, 24),
    st.sets(st.integers(0, 60), min_size=1, max_size=3),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ExpertShape, list[ExpertHost], int]:
    """A shape, its hosts, and slots that suffice; 0 = just enough."""
    shape, hosts = draw(SHAPES), draw(HOSTS)
    enough = slots_per_layer(shape.num_experts, len(hosts), 0)
    return shape, hosts, draw(st.just(0) | st.integers(enough, 2 * enough + 2))


def test_worked_example_of_the_module() -> None:
    placement = plan_placement(SHAPE, hosts_in("a/r/1", "a/r/2"), num_slots=3)
    assert experts_of(placement, "expert-0") == [0, 1, 2]
    assert experts_of(placement, "expert-1") == [2, 3, 0]


def test_slots_are_numbered_in_every_layer() -> None:
    placement = plan_placement(ExpertShape(num_experts=2, layer_ids=(3, 7)), hosts_in("a/r/1"), num_slots=0)
    assert placement == {"expert-0": (Slot(3, 0, 0), Slot(3, 1, 1), Slot(7, 0, 0), Slot(7, 1, 1))}


def test_another_expert_gets_the_spare_slot_in_every_layer() -> None:
    shape = ExpertShape(num_experts=5, layer_ids=(2, 3, 4))
    placement = plan_placement(shape, hosts_in("a/r/1", "b/r/2"), num_slots=3)
    doubled = [[e for e in range(5) if len(homes_of(placement, layer, e)) == 2] for layer in (2, 3, 4)]
    assert doubled == [[2], [3], [4]]


def test_blocks_are_contiguous_and_what_is_left_over_holds_a_copy() -> None:
    placement = plan_placement(ExpertShape(num_experts=5, layer_ids=(3,)), hosts_in(*["a/r/1"] * 2))
    assert [experts_of(placement, f"expert-{i}", 3) for i in range(2)] == [[0, 1, 3], [2, 3, 4]]


@given(problems())
def test_every_expert_is_held_and_slots_are_kept(problem: tuple[ExpertShape, list[ExpertHost], int]) -> None:
    shape, hosts, num_slots = problem
    placement = plan_placement(shape, hosts, num_slots=num_slots)
    bound = slots_per_layer(shape.num_experts, len(hosts), num_slots)
    assert list(placement) == [host.worker_id for host in hosts]
    for slots in placement.values():
        held = Counter((slot.layer_idx, slot.expert_idx) for slot in slots)
        assert max(held.values(), default=1) == 1
        assert max(Counter(slot.layer_idx for slot in slots).values(), default=0) <= bound
        assert [slot.slot_idx for slot in slots] == [i for n in _runs(slots) for i in range(n)]
    held_somewhere = {(s.layer_idx, s.expert_idx) for slots in placement.values() for s in slots}
    assert held_somewhere == {(layer, e) for layer in shape.layer_ids for e in range(shape.num_experts)}


def _runs(slots: Sequence[Slot]) -> list[int]:
    """Slots of each layer, in order."""
    return list(Counter(slot.layer_idx for slot in slots).values())


@given(problems())
def test_same_input_gives_the_same_placement(problem: tuple[ExpertShape, list[ExpertHost], int]) -> None:
    shape, hosts, num_slots = problem
    assert plan_placement(shape, hosts, num_slots=num_slots) == plan_placement(
        shape, list(hosts), num_slots=num_slots
    )


@given(
    experts_per_worker=st.integers(1, 6),
    workers_per_zone=st.integers(1, 3),
    layer_idx=st.integers(0, 60),
)
def test_with_room_for_two_of_each_no_zone_holds_both(
    experts_per_worker: int, workers_per_zone: int, layer_idx: int
) -> None:
    zones = [zone for zone in "ab" for _ in range(workers_per_zone)]
    hosts = hosts_in(*(f"{zone}/r/{i}" for i, zone in enumerate(zones)))
    shape = ExpertShape(num_experts=experts_per_worker * len(hosts), layer_ids=(layer_idx,))
    placement = plan_placement(shape, hosts, num_slots=2 * experts_per_worker)
    zone_of = {host.worker_id: host.failure_domain[0] for host in hosts}
    for expert_idx in range(shape.num_experts):
        zones_of_copies = [zone_of[worker] for worker in homes_of(placement, layer_idx, expert_idx)]
        assert sorted(zones_of_copies) == ["a", "b"]


@pytest.mark.parametrize(
    ("domains", "home_of_copy"),
    [
        (("a/r/1", "a/r/1", "b/r/2"), "expert-2"),
        (("a/r/1", "a/r/1", "a/s/2"), "expert-2"),
        (("a/r/1", "a/r/1", "a/r/2"), "expert-2"),
        (("a/r/1", "a/r/1", "a/r/1"), "expert-1"),
        # Names repeat from zone to zone: rack r of zone b is another rack.
        (("a/r/1", "b/r/1", "a/s/2"), "expert-1"),
    ],
)
def test_copy_goes_to_another_zone_then_rack_then_host(domains: tuple[str, ...], home_of_copy: str) -> None:
    placement = plan_placement(ExpertShape(num_experts=3, layer_ids=(0,)), hosts_in(*domains), num_slots=2)
    assert homes_of(placement, 0, 0) == ["expert-0", home_of_copy]


def test_copies_that_may_go_anywhere_go_to_the_emptiest() -> None:
    hosts = hosts_in("a/r/1", "b/r/2", "c/r/3", "d/r/4")
    placement = plan_placement(SHAPE, hosts, num_slots=3)
    assert [len(placement[host.worker_id]) for host in hosts] == [2, 2, 2, 2]


def test_more_workers_than_experts_leaves_some_to_hold_copies() -> None:
    placement = plan_placement(ExpertShape(num_experts=2, layer_ids=(0,)), hosts_in(*["a/r/1"] * 3))
    held = [experts_of(placement, f"expert-{i}") for i in range(3)]
    assert sorted(expert for experts in held for expert in experts) == [0, 0, 1]


def test_too_few_slots_name_the_field() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_placement(ExpertShape(num_experts=7, layer_ids=(0,)), hosts_in("a/r/1", "a/r/2"), num_slots=3)
    assert caught.value.field == "expert.num_slots"
    assert caught.value.message == (
        "config field 'expert.num_slots': "
        "wanted at least 4: 2 workers must hold 7 experts in every layer; got 3"
    )


@pytest.mark.parametrize(("num_slots", "slots"), [(0, 4), (4, 4), (9, 9)])
def test_slots_are_those_asked_for_or_just_enough(num_slots: int, slots: int) -> None:
    assert slots_per_layer(7, 2, num_slots) == slots
