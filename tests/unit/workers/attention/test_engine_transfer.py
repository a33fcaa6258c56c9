"""The engine on both sides of a hand-over: what a prefill gives away, and what a decode accepts."""

from dataclasses import replace

import pytest

from tests.reference_data import SHAPES, Golden, goldens
from tests.unit.workers.attention.harness import Lab, Listener, make_spec, open_engine
from workers.attention.types import CacheRows, Finish, NewToken, Sampling, Source

GOLDEN = goldens("default")[2]
"""40 tokens, 3 layers."""


def prefill(golden: Golden, *, max_step_tokens: int = 16, sampling: Sampling | None = None) -> Listener:
    """A finished prefill: its rows and its first token."""
    with open_engine(golden.shape, max_step_tokens=max_step_tokens) as lab:
        spec = make_spec(
            golden.prompt, source=Source.PREFILL_ONLY, max_tokens=12, sampling=sampling or Sampling()
        )
        listener = lab.submit(spec)
        listener.token()
        return listener


def receiver(lab: Lab, golden: Golden = GOLDEN, **fields: object) -> Listener:
    """A sequence that has its pages and waits for rows."""
    fields.setdefault("max_tokens", len(golden.tensor("greedy")))
    return lab.submit(make_spec(golden.prompt, source=Source.REMOTE, **fields)).admitted()


def send(lab: Lab, to: Listener, rows: list[CacheRows]) -> None:
    for item in rows:
        lab.engine.add_rows(to.spec.key, item)


@pytest.mark.parametrize("max_step_tokens", [1, 7, 16, 512])
@pytest.mark.parametrize("shape", ["default", "mtp"])
def test_prefill_gives_every_row_of_every_main_layer_once_and_in_order(
    shape: str, max_step_tokens: int
) -> None:
    golden = goldens(shape)[2]
    listener = prefill(golden, max_step_tokens=max_step_tokens)
    num_layers = {"default": 3, "mtp": 2}[shape]
    ends = [*range(max_step_tokens, len(golden.prompt), max_step_tokens), len(golden.prompt)]
    expected = [
        (layer_idx, begin, end - begin)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        for layer_idx in range(num_layers)
    ]
    assert [(r.layer_idx, r.first_token_idx, r.rows_TB.shape[0]) for r in listener.rows()] == expected
    assert listener.events[-1].token_id == golden.tensor("greedy")[0]
    assert listener.is_silent()


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_from_received_rows_is_that_of_the_golden(shape: str) -> None:
    golden = goldens(shape)[-1]
    given = prefill(golden)
    with open_engine(shape) as lab:
        to = receiver(lab, golden)
        send(lab, to, given.rows())
        lab.engine.finish_transfer(to.spec.key, given.events[-1])
        assert to.tokens() == golden.tensor("greedy").tolist()
        assert lab.metric("tokens_total", phase="prefill") == 0
        assert lab.metric("kv_bytes_total", direction="received") == sum(
            rows.rows_TB.nbytes for rows in given.rows()
        )


def test_sampled_decode_from_received_rows_equals_one_engine() -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    given = prefill(GOLDEN, sampling=sampling)
    with open_engine("default") as lab:
        to = receiver(lab, sampling=sampling)
        send(lab, to, given.rows())
        lab.engine.finish_transfer(to.spec.key, given.events[-1])
        assert to.tokens() == lab.run(GOLDEN.prompt, max_tokens=16, sampling=sampling)


@pytest.mark.parametrize(("max_tokens", "stops", "finish"), [(1, (), Finish.LENGTH), (9, (0,), Finish.STOP)])
def test_transferred_first_token_may_be_the_last(
    max_tokens: int, stops: tuple[int, ...], finish: Finish
) -> None:
    given = prefill(GOLDEN)
    first = given.events[-1].token_id
    stop_token_ids = frozenset(first for _ in stops)
    with open_engine("default") as lab:
        to = receiver(lab, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        send(lab, to, given.rows())
        lab.engine.finish_transfer(to.spec.key, NewToken(first, None))
        assert to.tokens() == [first]
        assert to.finish() is finish


def test_sequence_that_nobody_sends_rows_for_is_computed_here() -> None:
    """Some rows were stored before; it is computed from the beginning."""
    given = prefill(GOLDEN).rows()
    with open_engine("default") as lab:
        to = receiver(lab)
        send(lab, to, given[:4])
        lab.engine.compute_here(to.spec.key)
        send(lab, to, [replace(given[4], rows_TB=given[4].rows_TB + 1)])
        assert to.tokens() == GOLDEN.tensor("greedy").tolist()
        assert lab.metric("kv_refused_total", reason="not_receiving") == 1


def test_rows_leave_while_later_layers_are_not_computed() -> None:
    """The experts of layer 1 are asked for when the rows of layer 0 have left, those of 2 have not."""
    with open_engine("default") as lab:
        seen: list[tuple[int, int]] = []
        listener = Listener(make_spec(GOLDEN.prompt, source=Source.PREFILL_ONLY))
        lab.door.on_layer = lambda layer_idx: seen.append((layer_idx, listener.num_told))
        lab.engine.submit(listener.spec, listener)
        listener.token()
        assert seen == [(1, 2), (2, 3)], "admitted and layer 0; then layer 1"


def test_rows_behind_a_cancel_are_counted_and_ignored() -> None:
    given = prefill(GOLDEN).rows()
    with open_engine("default") as lab:
        to = receiver(lab)
        send(lab, to, given[:2])
        lab.engine.cancel(to.spec)
        send(lab, to, given[2:])
        lab.engine.finish_transfer(to.spec.key, NewToken(5, None))
        lab.is_empty()
        assert to.is_silent()
        assert lab.metric("kv_refused_total", reason="not_receiving") == 7


def test_rows_of_an_older_attempt_do_not_reach_the_newer() -> None:
    given = prefill(GOLDEN).rows()
    with open_engine("default") as lab:
        old = receiver(lab)
        lab.engine.cancel(old.spec)
        new = receiver(lab, attempt=1)
        send(lab, old, given)
        send(lab, new, given)
        lab.engine.finish_transfer(new.spec.key, NewToken(int(GOLDEN.tensor("greedy")[0]), None))
        assert new.tokens() == GOLDEN.tensor("greedy").tolist()
        assert lab.metric("kv_refused_total", reason="not_receiving") == len(given)


def test_rows_for_a_sequence_that_computes_itself_are_refused() -> None:
    given = prefill(GOLDEN).rows()
    with open_engine("default") as lab:
        lab.door.hold()
        local = lab.submit(make_spec(GOLDEN.prompt, max_tokens=16)).admitted()
        send(lab, local, [replace(given[0], rows_TB=given[0].rows_TB + 1)])
        lab.door.open()
        assert local.tokens() == GOLDEN.tensor("greedy").tolist()
        assert lab.metric("kv_refused_total", reason="not_receiving") == 1


def test_others_run_while_rows_arrive() -> None:
    given = prefill(GOLDEN)
    with open_engine("default") as lab:
        to = receiver(lab)
        assert lab.run(GOLDEN.prompt, max_tokens=16) == GOLDEN.tensor("greedy").tolist()
        send(lab, to, given.rows())
        lab.engine.finish_transfer(to.spec.key, given.events[-1])
        assert to.tokens() == GOLDEN.tensor("greedy").tolist()
