"""Which workers take a request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.requests.selection import Demand, Load, has_alternative, num_pages_of, plan_route


def test_decode_worker_with_the_most_free_pages_wins(make):
    view = make.view(make.worker("p", "prefill"), make.worker("a", "decode"), make.worker("b", "decode"))
    loads = {"a#1": Load(reserved_pages=30), "b#1": Load(reserved_pages=20, num_requests=9)}
    assert plan_route(view, loads).decode.worker_id == "b"


def test_free_pages_count_and_not_the_share_in_use(make):
    small, large = make.worker("a", "decode", num_pages=10), make.worker("b", "decode", num_pages=100)
    view = make.view(make.worker("p", "prefill"), small, large)
    assert plan_route(view, {"b#1": Load(reserved_pages=85)}).decode == large
    assert plan_route(view, {"b#1": Load(reserved_pages=95)}).decode == small


def test_equal_pages_go_by_requests_then_by_id(make):
    view = make.view(make.worker("p", "prefill"), make.worker("a", "decode"), make.worker("b", "decode"))
    loads = {"a#1": Load(reserved_pages=5, num_requests=2), "b#1": Load(reserved_pages=5, num_requests=1)}
    assert plan_route(view, loads).decode.worker_id == "b"
    assert plan_route(view, {}).decode.worker_id == "a"


def test_prefill_worker_with_the_fewest_queued_tokens_wins(make):
    view = make.view(make.worker("d", "decode"), make.worker("a", "prefill"), make.worker("b", "prefill"))
    loads = {"a#1": Load(queued_prompt_tokens=9), "b#1": Load(queued_prompt_tokens=8)}
    route = plan_route(view, loads)
    assert route.prefill.worker_id == "b"
    assert route.prefill_address == "b:1"


def test_workers_of_both_roles_alone_prefill_for_themselves(make):
    view = make.view(make.worker("a"), make.worker("b"))
    route = plan_route(view, {"a#1": Load(reserved_pages=1), "b#1": Load(queued_prompt_tokens=50)})
    assert route.decode.worker_id == "a"
    assert route.prefill_address == ""


def both_route(make, cached, loads, *, num_pages=4):
    view = make.view(make.worker("a"), make.worker("b"))
    demand = Demand(num_tokens=4096, num_pages=num_pages, page_tokens=16, cached_tokens=cached)
    return plan_route(view, loads, demand=demand)


@pytest.mark.parametrize(("num_requests", "expected"), [(50, "a"), (62, "a"), (63, "b"), (120, "b")])
def test_worked_example_of_workers_that_prefill_for_themselves(make, num_requests, expected):
    route = both_route(make, {"a#1": 4000}, {"a#1": Load(num_requests=num_requests)})
    assert route.decode.worker_id == expected
    assert route.reason == ("prefix" if expected == "a" else "load")


def test_worker_of_both_roles_without_room_is_passed_over(make):
    loads = {"a#1": Load(reserved_pages=97)}
    assert both_route(make, {}, loads, num_pages=4).decode.worker_id == "b"
    assert both_route(make, {"a#1": 16}, loads, num_pages=4).decode.worker_id == "a"


def apart_route(make, cached, loads):
    workers = [make.worker(name, "decode" if name in "ab" else "prefill") for name in "abpq"]
    demand = Demand(num_tokens=100, num_pages=9, page_tokens=16, cached_tokens=cached)
    return plan_route(make.view(*workers), loads, demand=demand)


@pytest.mark.parametrize(
    ("cached", "queued", "expected", "reason"),
    [
        ({}, 0, "p", "cold"),
        ({"q#1": 48}, 0, "q", "prefix"),
        ({"q#1": 48}, 47, "q", "prefix"),
        ({"q#1": 48}, 49, "p", "load"),
        ({"q#1": 48, "p#1": 16}, 31, "q", "prefix"),
        ({"q#1": 48, "p#1": 16}, 33, "p", "load"),
    ],
)
def test_cached_prefix_draws_until_the_queue_costs_more(make, cached, queued, expected, reason):
    route = apart_route(make, cached, {"q#1": Load(queued_prompt_tokens=queued)})
    assert (route.prefill.worker_id, route.reason) == (expected, reason)


@pytest.mark.parametrize(("reserved", "expected"), [(0, "b"), (2, "b"), (4, "a")])
def test_cached_pages_need_no_room_at_a_decode_worker(make, reserved, expected):
    route = apart_route(make, {"b#1": 48}, {"b#1": Load(reserved_pages=reserved)})
    assert route.decode.worker_id == expected


def test_worker_of_both_roles_prefills_for_others_when_it_is_the_least_queued(make):
    view = make.view(make.worker("b"), make.worker("d", "decode"), make.worker("p", "prefill"))
    loads = {"b#1": Load(reserved_pages=90), "p#1": Load(queued_prompt_tokens=5)}
    route = plan_route(view, loads)
    assert (route.decode.worker_id, route.prefill.worker_id) == ("d", "b")


def test_same_worker_for_both_has_no_prefill_address(make):
    view = make.view(make.worker("b"), make.worker("p", "prefill"))
    route = plan_route(view, {"p#1": Load(queued_prompt_tokens=5)})
    assert route.prefill_address == ""


def test_dedicated_prefill_worker_is_preferred_on_a_tie(make):
    view = make.view(make.worker("b"), make.worker("p", "prefill"))
    assert plan_route(view, {}).prefill.worker_id == "p"


def test_worker_to_avoid_is_taken_only_without_another(make):
    one, two = make.worker("a"), make.worker("b")
    assert plan_route(make.view(one, two), {}, avoid=("a#1",)).decode == two
    assert plan_route(make.view(one), {}, avoid=("a#1",)).decode == one
    assert plan_route(make.view(one, two), {}, avoid=("a#1", "b#1")).decode == one


def test_no_route_without_a_prefill_or_a_decode_worker(make):
    assert plan_route(make.view(make.worker("d", "decode")), {}) is None
    assert plan_route(make.view(make.worker("p", "prefill")), {}) is None


@pytest.mark.parametrize(
    ("avoid", "expected"),
    [((), True), (("p1#1",), True), (("p1#1", "p2#1"), False), (("d#1",), False), (("d#2",), True)],
)
def test_alternative_needs_both_kinds(make, avoid, expected):
    view = make.view(make.worker("d", "decode"), make.worker("p1", "prefill"), make.worker("p2", "prefill"))
    assert has_alternative(view, avoid) == expected


@pytest.mark.parametrize(
    ("num_tokens", "page_tokens", "num_pages"), [(0, 64, 0), (1, 64, 1), (64, 64, 1), (65, 64, 2), (9, 0, 0)]
)
def test_num_pages(num_tokens, page_tokens, num_pages):
    assert num_pages_of(num_tokens, page_tokens) == num_pages


@given(data=st.data())
def test_route_does_not_depend_on_the_order_of_members_or_loads(make, data):
    roles = data.draw(st.lists(st.sampled_from(["prefill", "decode", "both"]), min_size=1, max_size=6))
    workers = [make.worker(f"w{idx}", role) for idx, role in enumerate(roles)]
    load = st.builds(
        Load,
        queued_prompt_tokens=st.integers(0, 2),
        reserved_pages=st.integers(0, 2),
        num_requests=st.integers(0, 2),
    )
    loads = {worker.key: data.draw(load) for worker in workers}
    shuffled = data.draw(st.permutations(workers))
    reordered = dict(reversed(loads.items()))
    route = plan_route(make.view(*workers), loads)
    assert route == plan_route(make.view(*shuffled), reordered)
    if route:
        assert route.decode.can_decode
        assert route.prefill.can_prefill
