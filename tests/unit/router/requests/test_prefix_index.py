"""What the router believes workers to hold: found by prefix, bounded, corrected, forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.requests.affinity import PrefixAffinity
from router.requests.prefix_index import Cached, PrefixIndex, chain_of
from router.requests.selection import Route
from wire.metrics import Metrics

PAGE = 4


def index_with(*prompts, num_pages=100):
    index = PrefixIndex(max_pages=1000)
    for prompt in prompts:
        index.learn("a#1", chain_of(prompt, PAGE), num_pages=num_pages)
    return index


def cached(index, prompt, key="a#1"):
    return index.look_up(key, chain_of(prompt, PAGE)).num_tokens


@given(
    known=st.lists(st.integers(0, 1), max_size=20),
    asked=st.lists(st.integers(0, 1), min_size=1, max_size=20),
)
def test_longest_common_run_of_full_pages_is_found(known, asked):
    pages = 0
    while known[: (pages + 1) * PAGE] == asked[: (pages + 1) * PAGE] and len(known) >= (pages + 1) * PAGE:
        pages += 1
        if pages * PAGE > len(asked):
            break
    usable = min(pages, (len(asked) - 1) // PAGE)
    assert cached(index_with(known), asked) == usable * PAGE


def test_last_token_is_always_computed():
    assert cached(index_with(range(8)), range(8)) == 4
    assert cached(index_with(range(8)), range(9)) == 8


def test_worker_that_is_not_known_holds_nothing():
    assert index_with(range(9)).look_up("b#1", chain_of(range(9), PAGE)) == Cached()


def test_unknown_page_length_and_switched_off_index_find_nothing():
    index = PrefixIndex(max_pages=0)
    index.learn("a#1", chain_of(range(9), PAGE), num_pages=100)
    assert cached(index, range(9)) == 0
    assert chain_of(range(9), 0).num_reusable == 0


def test_longest_unused_prompt_loses_its_end_first():
    old, new = range(12), range(100, 108)
    index = index_with(old, new, num_pages=4)
    assert (cached(index, [*old, 1]), cached(index, [*new, 1])) == (8, 8)
    index = index_with(old, new, old, range(200, 204), num_pages=4)
    assert (cached(index, [*old, 1]), cached(index, [*new, 1])) == (12, 0)


def test_missing_page_takes_what_is_as_old_with_it():
    first, second, third = range(9), range(100, 109), range(200, 209)
    index = index_with(first, second, third)
    chain = chain_of(second, PAGE)
    expected = index.look_up("a#1", chain)
    index.learn("a#1", chain, num_pages=100)
    index.correct("a#1", expected, num_found=0)
    assert [cached(index, prompt) for prompt in (first, second, third)] == [0, 8, 8]


def test_worker_that_found_as_much_or_more_corrects_nothing():
    index = index_with(range(9))
    expected = index.look_up("a#1", chain_of(range(9), PAGE))
    index.correct("a#1", expected, num_found=8)
    index.correct("a#1", Cached(), num_found=8)
    assert cached(index, range(9)) == 8


def test_worker_started_again_is_forgotten():
    index = index_with(range(9))
    index.drop_absent(["a#2"])
    assert index.num_pages("a#1") == 0


def test_affinity_learns_from_routes_and_from_answers(make):
    metrics = Metrics("router")
    affinity = PrefixAffinity(max_pages=100, metrics=metrics)
    view, request = make.view(make.worker("a")), make.request(prompt_ids=tuple(range(2, 12)))
    route = Route(decode=view.workers[0], prefill=view.workers[0])
    trip = affinity.plan(request, view, num_replayed=0)
    assert (trip.demand.num_tokens, trip.demand.num_pages, trip.demand.cached_tokens) == (10, 5, {})
    affinity.depart(trip, route)
    again = affinity.plan(request, view, num_replayed=3)
    assert (again.demand.num_tokens, again.demand.cached_tokens) == (13, {"a#1": 8})
    affinity.depart(again, route)
    affinity.arrive(again, route, num_found=4)
    values = [
        metrics.registry.get_sample_value(f"moray_router_prefix_{name}_total")
        for name in ("lookup_tokens", "hit_tokens", "corrections")
    ]
    assert values == [23, 8, 1]


class IndexMachine(RuleBasedStateMachine):
    """Prompts of two letters, three workers, in any order; beliefs stay prefixes of what was sent."""

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex(max_pages=6)
        self.sent = {}

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)
    keys = st.sampled_from(["a#1", "b#1", "c#1"])

    @rule(key=keys, prompt=prompts, num_pages=st.integers(0, 8), num_found=st.integers(0, 24))
    def send(self, key, prompt, num_pages, num_found):
        chain = chain_of(prompt, PAGE)
        expected = self.index.look_up(key, chain)
        assert expected.num_tokens < len(prompt)
        assert expected.num_tokens == 0 or any(
            old[: expected.num_tokens] == prompt[: expected.num_tokens] for old in self.sent.get(key, [])
        )
        self.index.learn(key, chain, num_pages=num_pages)
        self.sent.setdefault(key, []).append(prompt)
        self.index.correct(key, expected, num_found=num_found)

    @rule(present=st.sets(keys))
    def leave(self, present):
        self.index.drop_absent(present)
        self.sent = {key: prompts for key, prompts in self.sent.items() if key in present}

    @invariant()
    def pages_are_chained_and_bounded(self):
        self.index.check_integrity()


TestIndexMachine = IndexMachine.TestCase


@pytest.mark.parametrize("num_tokens", [0, 3, 4, 9])
def test_chain_has_one_digest_a_full_page(num_tokens):
    assert len(chain_of(range(num_tokens), PAGE).digests) == num_tokens // PAGE
