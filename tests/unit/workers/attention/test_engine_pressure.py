"""Too few pages for all: sequences start again, and every text is that of the request alone."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import Lab, make_spec, open_engine
from wire.errors import Overloaded
from workers.attention.types import NewToken, RowsUnwanted, Sampling, Source

PROMPT = tuple(random.Random(5).choices(range(3, 320), k=21))


def preemptions(lab: Lab) -> float:
    return sum(lab.metric("preemptions_total", state=s) for s in ("prefill", "decode", "receiving"))


def prompt(seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, 320), k=21))


@pytest.mark.parametrize("prefix_reuse", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=4)], ids=["greedy", "seed"])
def test_preempted_sequences_give_the_same_text(sampling: Sampling, prefix_reuse: bool) -> None:
    """Each begins in 6 pages and grows to 11: three begin in 20 pages and one ends there."""
    with open_engine("sparse") as lab:
        alone = [lab.run(prompt(i), max_tokens=24, sampling=sampling) for i in range(4)]
    with open_engine("sparse", num_pages=20, lookahead_tokens=1, prefix_reuse=prefix_reuse) as lab:
        with lab.pause():
            listeners = [
                lab.submit(make_spec(prompt(i), request_id=str(i), max_tokens=24, sampling=sampling))
                for i in range(4)
            ]
        assert [listener.tokens() for listener in listeners] == alone
        assert preemptions(lab) > 0
        # Preempted or not, it is a new request only once, and its own pages are no saving.
        firsts = [next(e for e in x.events if isinstance(e, NewToken)) for x in listeners]
        assert [first.num_cached_tokens for first in firsts] == [0] * 4


def test_higher_priority_takes_the_pages_of_a_lower_one() -> None:
    with open_engine("default", num_pages=8, prefix_reuse=False) as lab:
        expected = [lab.run(prompt(i), max_tokens=8) for i in range(2)]
        lab.door.hold()
        low = lab.submit(make_spec(prompt(0), request_id="low", max_tokens=8))
        lab.door.step(3)
        assert [low.token().token_id for _ in range(3)] == expected[0][:3]
        high = lab.submit(make_spec(prompt(1), request_id="high", max_tokens=8, priority=1))
        lab.door.open()
        assert high.tokens() == expected[1]
        assert low.tokens() == expected[0]
        assert preemptions(lab) == 1


def test_sequence_whose_rows_are_under_way_starts_again_here() -> None:
    """Its rows come too late and are ignored; the text is the same."""
    with open_engine("default", num_pages=8, prefix_reuse=False) as lab:
        expected = [lab.run(prompt(i), max_tokens=8) for i in range(2)]
        remote = lab.submit(
            make_spec(prompt(0), request_id="remote", max_tokens=8, source=Source.REMOTE)
        ).admitted()
        high = lab.submit(make_spec(prompt(1), request_id="high", max_tokens=8, priority=1))
        assert high.tokens() == expected[1]
        assert remote.tokens() == expected[0]
        assert lab.metric("preemptions_total", state="receiving") == 1
        assert sum(isinstance(event, RowsUnwanted) for event in remote.events) == 1


def test_cancelled_while_preempted_leaves_nothing() -> None:
    with open_engine("default", num_pages=8, prefix_reuse=False) as lab:
        lab.door.hold()
        low = lab.submit(make_spec(prompt(0), request_id="low", max_tokens=8))
        lab.door.step()
        low.token()
        high = lab.submit(make_spec(prompt(1), request_id="high", max_tokens=8, priority=1))
        lab.door.step()
        lab.until_metric(1, "preemptions_total", state="decode")
        lab.engine.cancel(low.spec)
        lab.door.open()
        assert len(high.tokens()) == 8
        assert lab.engine._residents.gate.is_empty()


def test_full_queue_refuses_before_the_step_ends() -> None:
    """The engine stands in a step; the answer is there when `submit` returns."""
    with open_engine("default", num_pages=8, max_queued_requests=2) as lab:
        lab.door.hold()
        first = lab.submit(make_spec(PROMPT, request_id="first")).admitted()
        queued = [lab.submit(make_spec(PROMPT, request_id=str(i))) for i in range(2)]
        refused = lab.submit(make_spec(PROMPT, request_id="refused"))
        assert not refused.is_silent()
        error = refused.error()
        assert isinstance(error, Overloaded)
        assert "wanted at most 2" in error.message
        assert error.retry_after_s >= 1
        lab.engine.cancel(refused.spec)
        lab.door.open()
        assert first.tokens() == queued[0].tokens() == queued[1].tokens()
        assert lab.metric("refused_total", reason="queue") == 1
        assert lab.engine._residents.gate.is_empty()


def test_patience_ends_while_the_engine_has_nothing_to_do() -> None:
    """All pages belong to one whose rows never come: no command and no step wakes the engine."""
    with open_engine("default", num_pages=8, max_queue_s=0.05) as lab:
        remote = lab.submit(make_spec(PROMPT, request_id="remote", source=Source.REMOTE)).admitted()
        waiting = lab.submit(make_spec(PROMPT[::-1], request_id="waiting"))
        error = waiting.error()
        assert isinstance(error, Overloaded)
        assert "waited 0.1 s for KV pages; try again in 0.05 s" in error.message
        lab.engine.cancel(remote.spec)
        lab.is_empty()
        assert lab.engine._residents.gate.is_empty()


@pytest.mark.parametrize("fields", [{"max_tokens": 500}, {"request_id": "first"}])
def test_refused_requests_do_not_stay_in_the_queue(fields: dict[str, object]) -> None:
    with open_engine("default", num_pages=8, max_queued_requests=1) as lab:
        lab.door.hold()
        first = lab.submit(make_spec(PROMPT, request_id="first")).admitted()
        bad = lab.submit(make_spec(PROMPT, **{"request_id": "bad", **fields}))
        lab.door.open()
        assert bad.error()
        assert len(first.tokens()) == 8
        lab.check()
        assert lab.engine._residents.gate.is_empty()


@settings(max_examples=25)
@given(data=st.data())
def test_random_requests_under_pressure_equal_each_alone(data: st.DataObject) -> None:
    """Tiny pools, priorities, common prefixes, cancels, drafts; each survivor's text is that of it alone."""
    shape = data.draw(st.sampled_from(["default", "sparse", "mtp"]))
    max_drafts = data.draw(st.sampled_from([0, 3])) if shape == "mtp" else 0
    kv: dict[str, Any] = {"dtype": data.draw(st.sampled_from(["float32", "fp8"]))}
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    words = [rng.choices(range(3, 320), k=rng.randint(1, 9)) for _ in range(3)]
    requests = [
        {
            "prompt": [t for word in rng.choices(words, k=rng.randint(1, 4)) for t in word],
            "max_tokens": rng.randint(1, 16),
            "sampling": Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randint(0, 9)),
        }
        for _ in range(8)
    ]
    with open_engine(shape, prefix_reuse=False, kv=kv) as lab:
        alone = [lab.run(**fields) for fields in requests]
    group = {
        "num_pages": data.draw(st.sampled_from([14, 18, 30])),
        "max_step_tokens": data.draw(st.sampled_from([3, 8, 64])),
        "max_batch_requests": data.draw(st.sampled_from([2, 8])),
        "lookahead_tokens": data.draw(st.sampled_from([1, 6])),
        "prefix_reuse": data.draw(st.booleans()),
        "context_cost_tokens": data.draw(st.sampled_from([4, 65536])),
    }
    kv["host_tier_bytes"] = data.draw(st.sampled_from([0, 1 << 20]))
    with open_engine(shape, kv=kv, max_drafts=max_drafts, **group) as lab:
        listeners = [
            lab.submit(
                make_spec(**fields, request_id=str(i), priority=rng.randint(0, 1), tenant=rng.choice("ab"))
            )
            for i, fields in enumerate(requests)
        ]
        cancelled = set(rng.sample(range(8), k=2))
        for i in cancelled:
            lab.engine.cancel(listeners[i].spec)
        for i, listener in enumerate(listeners):
            if i not in cancelled:
                assert listener.tokens() == alone[i]
        lab.is_empty()
        assert lab.engine._residents.gate.is_empty()
