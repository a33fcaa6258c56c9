"""Who goes first in the engine: priorities, tenants, deadlines."""

import pytest

from tests.unit.workers.attention.harness import Lab, Listener, make_spec, open_engine
from wire.errors import DeadlinePassed

PROMPT = tuple(range(3, 24))


def _order_of(lab: Lab, specs: list[dict[str, object]], **common: object) -> list[str]:
    """Request ids by their first tokens, of requests that are all there when the first step begins."""
    order: list[str] = []
    lab.door.hold()
    blocker = lab.submit(make_spec([5], request_id="blocker", max_tokens=2))
    listeners = []
    for i, fields in enumerate(specs):
        spec = make_spec(PROMPT[::-1], request_id=str(i), max_tokens=1, **{**common, **fields})
        listener = Listener(spec)

        def sink(event: object, listener: Listener = listener) -> None:
            if getattr(event, "finish", None) is not None:
                order.append(listener.spec.request_id)
            listener(event)  # type: ignore[arg-type]

        lab.engine.submit(spec, sink)
        listeners.append(listener)
    lab.door.open()
    for listener in [blocker, *listeners]:
        listener.tokens()
    return order


@pytest.mark.parametrize("num_pages", [7, 128])
def test_higher_priority_goes_first(num_pages: int) -> None:
    """With 7 pages it waits for pages, with 128 for its turn in a step."""
    with open_engine("default", num_pages=num_pages, max_step_tokens=21, prefix_reuse=False) as lab:
        order = _order_of(lab, [{"priority": p} for p in (0, -1, 5, 0, 5)])
    assert order == ["2", "4", "0", "3", "1"]


def test_tenants_take_turns_whoever_came_first() -> None:
    with open_engine("default", num_pages=7, prefix_reuse=False) as lab:
        order = _order_of(lab, [{"tenant": t} for t in "aaaab"])
    assert order.index("4") <= 1


def test_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    """21 tokens at 1 s each do not fit in 20 s."""
    with open_engine("default") as lab:
        lab.engine._pace.seconds_per_cost = 1.0
        lab.door.hold()
        hopeless = lab.submit(make_spec(PROMPT, request_id="hopeless", deadline_ms=20_000))
        error = hopeless.error()
        assert isinstance(error, DeadlinePassed)
        assert "in the 20000 ms that it has" in error.message
        assert lab.door.num_arrivals == 0
        lab.door.open()
        assert len(lab.run(PROMPT, deadline_ms=60_000)) == 8


def test_cached_prefix_makes_a_deadline_possible() -> None:
    """One token is left to compute; 21 would take 21 s."""
    with open_engine("default") as lab:
        text = lab.run(PROMPT)
        lab.engine._pace.seconds_per_cost = 1.0
        assert lab.run(PROMPT, deadline_ms=15_000) == text
