"""Homes: which node a worker starts on; selectors and capacity hold, groups spread."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.homes import Home, Needs, NodeCapacity, plan_home
from cluster.topology.types import NodeTopology


def node(name: str, domain: str = "//", *, cpus: float = 8, gpus: float = 0, **labels: str) -> NodeCapacity:
    """A node in "zone/rack/host"."""
    zone, rack, host = domain.split("/")
    topology = NodeTopology(node_id=name, address=name, host=host, zone=zone, rack=rack, labels=labels)
    return NodeCapacity(topology=topology, num_cpus=cpus, num_gpus=gpus)


def needs(group: str = "expert", **more: object) -> Needs:
    return Needs(group=group, **({"node_selector": {}} | more))  # type: ignore[arg-type]  # of its own types


def place(count: int, wanted: Needs, nodes: list[NodeCapacity], taken: list[Home] | None = None) -> list[str]:
    """Nodes of `count` workers, one after the other; "" where none could take it."""
    homes = list(taken or [])
    found = []
    for _ in range(count):
        home = plan_home(wanted, nodes, homes)
        found.append(home.node_id if home else "")
        if home:
            homes.append(Home(home.node_id, wanted))
    return found


def test_worked_example_of_the_module() -> None:
    nodes = [node("n1", "a/r/1"), node("n2", "a/r/2"), node("n3", "b/r/3")]
    assert place(2, needs(), nodes) == ["n1", "n3"]


@pytest.mark.parametrize(
    "domains",
    [
        ("a/r/1", "a/s/2", "b/r/3"),
        ("a/r/1", "a/r/2", "a/s/3"),
        ("a/r/1", "a/r/1", "a/r/2"),
    ],
)
def test_second_of_a_group_goes_to_another_zone_then_rack_then_host(domains: tuple[str, ...]) -> None:
    nodes = [node(f"n{i}", domain) for i, domain in enumerate(domains)]
    assert place(3, needs(), nodes) == ["n0", "n2", "n1"]


def test_zone_counts_before_rack() -> None:
    nodes = [node("n0", "a/r/1"), node("n1", "a/s/2"), node("n2", "b/r/3")]
    taken = [Home("n0", needs()), Home("n0", needs()), Home("n1", needs()), Home("n2", needs())]
    assert place(1, needs(), nodes, taken) == ["n2"]


def test_two_nodes_on_one_host_take_turns() -> None:
    nodes = [node("n1", "a/r/1"), node("n2", "a/r/1")]
    assert place(4, needs(), nodes) == ["n1", "n2", "n1", "n2"]


def test_own_group_counts_before_others_on_one_host() -> None:
    nodes = [node("n1", "a/r/1"), node("n2", "a/r/1")]
    taken = [Home("n1", needs()), Home("n2", needs("decode")), Home("n2", needs("decode"))]
    assert place(1, needs(), nodes, taken) == ["n2"]


def test_other_groups_do_not_spread_this_one_but_break_ties() -> None:
    nodes = [node("n1", "a/r/1"), node("n2", "a/r/2")]
    taken = [Home("n1", needs("decode"))]
    assert place(1, needs(), nodes, taken) == ["n2"]
    nodes = [node("n1", "a/r/1"), node("n2", "b/r/2")]
    taken = [Home("n1", needs("decode")), Home("n1", needs("decode")), Home("n2", needs())]
    assert place(1, needs(), nodes, taken) == ["n1"]


def test_selector_asks_for_every_label() -> None:
    nodes = [node("bare"), node("half", disk="ssd"), node("whole", disk="ssd", net="ib")]
    assert place(1, needs(node_selector={"disk": "ssd", "net": "ib"}), nodes) == ["whole"]
    assert place(1, needs(node_selector={"disk": "hdd"}), nodes) == [""]


def test_gpus_bound_how_many_fit() -> None:
    nodes = [node("cpu-only"), node("gpu", gpus=2)]
    assert place(3, needs(num_gpus=1.0), nodes) == ["gpu", "gpu", ""]


def test_cpus_of_other_groups_count() -> None:
    taken = [Home("n1", needs("decode", num_cpus=6.0))]
    assert place(2, needs(num_cpus=2.0), [node("n1")], taken) == ["n1", ""]


def test_worker_that_reserves_nothing_fits_a_full_node() -> None:
    taken = [Home("n1", needs("decode", num_cpus=8.0))]
    assert place(1, needs(), [node("n1")], taken) == ["n1"]


def test_bound_per_node_counts_its_own_group_only() -> None:
    nodes = [node("n1", "a/r/1"), node("n2", "a/r/2")]
    taken = [Home("n1", needs("decode"))]
    assert place(3, needs(max_per_node=1), nodes, taken) == ["n2", "n1", ""]


def test_no_node_no_home() -> None:
    assert place(1, needs(), []) == [""]


def test_homes_on_nodes_that_died_do_not_count() -> None:
    taken = [Home("gone", needs()), Home("gone", needs())]
    assert place(2, needs(), [node("n1", "a/r/1"), node("n2", "b/r/2")], taken) == ["n1", "n2"]


NODES = st.lists(
    st.builds(
        lambda zone, rack, host, cpus, gpus, disk: (f"{zone}/{rack}/{host}", cpus, gpus, disk),
        st.sampled_from("ab"),
        st.sampled_from("rs"),
        st.sampled_from("12"),
        st.integers(0, 8),
        st.integers(0, 4),
        st.sampled_from(["ssd", "hdd"]),
    ),
    max_size=5,
).map(
    lambda rows: [
        node(f"n{i}", domain, cpus=cpus, gpus=gpus, disk=disk)
        for i, (domain, cpus, gpus, disk) in enumerate(rows)
    ]
)
WORKERS = st.lists(
    st.builds(
        lambda group, cpus, gpus, bound, selector: needs(
            group, num_cpus=float(cpus), num_gpus=float(gpus), max_per_node=bound, node_selector=selector
        ),
        st.sampled_from(["expert", "prefill", "decode"]),
        st.integers(0, 3),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from([{}, {"disk": "ssd"}]),
    ),
    max_size=12,
)


def place_all(workers: list[Needs], nodes: list[NodeCapacity]) -> list[Home]:
    homes: list[Home] = []
    for wanted in workers:
        home = plan_home(wanted, nodes, homes)
        if home is not None:
            homes.append(Home(home.node_id, wanted))
    return homes


@given(WORKERS, NODES)
def test_no_node_is_ever_over_its_capacity(workers: list[Needs], nodes: list[NodeCapacity]) -> None:
    homes = place_all(workers, nodes)
    for each in nodes:
        here = [home.needs for home in homes if home.node_id == each.topology.node_id]
        assert sum(wanted.num_cpus for wanted in here) <= each.num_cpus
        assert sum(wanted.num_gpus for wanted in here) <= each.num_gpus
        assert all(wanted.node_selector.items() <= each.topology.labels.items() for wanted in here)


@given(WORKERS, NODES)
def test_bound_per_node_holds_for_who_asked_for_it(workers: list[Needs], nodes: list[NodeCapacity]) -> None:
    homes: list[Home] = []
    for wanted in workers:
        home = plan_home(wanted, nodes, homes)
        if home is not None:
            peers = sum(h.node_id == home.node_id and h.needs.group == wanted.group for h in homes)
            assert wanted.max_per_node == 0 or peers < wanted.max_per_node
            homes.append(Home(home.node_id, wanted))


@given(st.integers(0, 20), NODES.filter(bool))
def test_group_that_fits_everywhere_spreads_evenly_over_zones(count: int, nodes: list[NodeCapacity]) -> None:
    found = place(count, needs(), nodes)
    per_zone = Counter(next(n.topology.zone for n in nodes if n.topology.node_id == name) for name in found)
    sizes = [per_zone[zone] for zone in {n.topology.zone for n in nodes}]
    assert max(sizes) - min(sizes) <= 1
