"""Prefix reuse in the engine: fewer tokens computed, the same text, in every role."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.workers.attention.harness import Lab, Listener, make_spec, open_engine
from workers.attention.types import NewToken, Sampling, Source

PROMPT = tuple(random.Random(3).choices(range(3, 320), k=21))
"""Five full pages and a token."""


def first_token(listener: Listener) -> NewToken:
    """The first of the tokens read so far."""
    return next(event for event in listener.events if isinstance(event, NewToken))


def computed(lab: Lab, phase: str = "prefill") -> float:
    return lab.metric("tokens_total", phase=phase)


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(21, 20), (20, 19), (5, 4), (4, 3), (1, 0)])
def test_second_request_computes_what_no_page_holds(num_tokens: int, num_cached: int) -> None:
    """One token is always computed, for the logits behind it; the rest of a full last page is copied."""
    with open_engine("default") as lab:
        first = lab.run(PROMPT[:num_tokens])
        again = lab.submit(make_spec(PROMPT[:num_tokens]))
        assert again.tokens() == first
        assert first_token(again).num_cached_tokens == num_cached
        assert [e.num_cached_tokens for e in again.events if isinstance(e, NewToken)][1:] == [0] * 7
        assert computed(lab) == 2 * num_tokens - num_cached
        assert lab.metric("prefix_hit_tokens_total") == num_cached


def test_without_reuse_everything_is_computed() -> None:
    with open_engine("default", prefix_reuse=False) as lab:
        assert lab.run(PROMPT) == lab.run(PROMPT)
        lab.is_empty()
        assert (computed(lab), lab.metric("pages", state="free")) == (42, 128)
        assert lab.metric("prefix_hit_tokens_total") == lab.metric("prefix_lookup_tokens_total") == 0


def test_replay_takes_generated_pages_too() -> None:
    """21 prompt tokens and 20 of 24 generated ones, whose rows are there: ten pages of 41 tokens."""
    with open_engine("default") as lab:
        whole = lab.run(PROMPT, max_tokens=24)
        replay = make_spec([*PROMPT, *whole[:20]], attempt=1, max_tokens=4, num_prompt_tokens=len(PROMPT))
        listener = lab.submit(replay)
        assert listener.tokens() == whole[20:]
        assert first_token(listener).num_cached_tokens == 40


@pytest.mark.parametrize(("shape", "num_cached"), [("default", 21), ("sparse", 40)])
def test_next_turn_of_a_chat_takes_what_has_its_bits(shape: str, num_cached: int) -> None:
    """The answer is a prompt now. Below index_topk (16 of sparse, 512 of default) that is another form.

    The page that prompt and answer share is copied up to the answer.
    """
    with open_engine(shape) as lab:
        answer = lab.run(PROMPT, max_tokens=24)
        turn = [*PROMPT, *answer[:20]]
        listener = lab.submit(make_spec(turn))
        with open_engine(shape, prefix_reuse=False) as other:
            assert listener.tokens() == other.run(turn)
        assert first_token(listener).num_cached_tokens == num_cached


@pytest.mark.parametrize("max_step_tokens", [4, 7, 512])
def test_requests_at_the_same_time_compute_a_prompt_once(max_step_tokens: int) -> None:
    """42 tokens: ten full pages once, and two tokens for each."""
    prompt = PROMPT[::-1] + PROMPT
    with open_engine("default", max_step_tokens=max_step_tokens) as lab:
        lab.door.hold()
        with lab.pause():
            lab.submit(make_spec(PROMPT, request_id="other", max_tokens=1))
            listeners = [lab.submit(make_spec(prompt, request_id=str(i))) for i in range(3)]
        lab.door.open()
        texts = [listener.tokens() for listener in listeners]
        lab.is_empty()
        assert computed(lab) == 21 + 40 + 3 * 2
    with open_engine("default", prefix_reuse=False) as lab:
        assert texts == [lab.run(prompt)] * 3


def test_running_sequences_share_their_pages() -> None:
    """9 pages of prompt and 2 more for each: 36 of 40 prompt tokens are there once."""
    with open_engine("default", num_pages=64) as lab:
        prompt = (PROMPT + PROMPT)[:37]
        expected = lab.run(prompt)
        lab.door.hold()
        with lab.pause():
            listeners = [lab.submit(make_spec(prompt, request_id=str(i))) for i in range(4)]
        lab.until_metric(9 + 4 * 2, "pages", state="used")
        lab.door.open()
        assert [listener.tokens() for listener in listeners] == [expected] * 4


@pytest.mark.parametrize("num_equal", [1, 3])
def test_page_that_two_texts_leave_apart_is_copied_and_not_written(num_equal: int) -> None:
    """Both share two pages and some tokens of the third; the first text comes again unharmed."""
    common = PROMPT[: 8 + num_equal]
    with open_engine("default", prefix_reuse=False) as lab:
        expected = [lab.run([*common, *tail]) for tail in (PROMPT[12:], PROMPT[:9])]
    with open_engine("default") as lab:
        assert lab.run([*common, *PROMPT[12:]]) == expected[0]
        other = lab.submit(make_spec([*common, *PROMPT[:9]]))
        assert other.tokens() == expected[1]
        assert first_token(other).num_cached_tokens == 8 + num_equal
        assert lab.run([*common, *PROMPT[12:]]) == expected[0]


def test_page_to_copy_from_may_go_to_make_room() -> None:
    """Both need all 8 pages; the second would copy one token of a page of the first that it gets itself."""
    other = (PROMPT[0], *PROMPT[2:])
    with open_engine("default", prefix_reuse=False) as lab:
        expected = lab.run(other, max_tokens=12)
    with open_engine("default", num_pages=8) as lab:
        lab.run(PROMPT, max_tokens=12)
        listener = lab.submit(make_spec(other, max_tokens=12))
        assert listener.tokens() == expected
        assert first_token(listener).num_cached_tokens in (0, 1)


def test_pages_of_the_oldest_text_are_given_away() -> None:
    with open_engine("default", num_pages=8) as lab:
        first = lab.run(PROMPT)
        lab.run(PROMPT[::-1], max_tokens=12)
        lab.is_empty()
        assert lab.metric("prefix_evictions_total") == 7
        assert lab.run(PROMPT) == first
        assert lab.metric("prefix_hit_tokens_total") == 0


@pytest.mark.parametrize("source", [Source.LOCAL, Source.PREFILL_ONLY])
def test_cancelled_request_leaves_what_it_computed(source: Source) -> None:
    with open_engine("default", max_step_tokens=5) as lab:
        lab.door.hold()
        gone = lab.submit(make_spec(PROMPT, request_id="gone", source=source))
        lab.door.step(3)
        lab.until(lambda: lab.door.num_arrivals == 4)
        lab.engine.cancel(gone.spec)
        lab.door.open()
        lab.is_empty()
        listener = lab.submit(make_spec(PROMPT))
        assert len(listener.tokens()) == 8
        assert first_token(listener).num_cached_tokens == 20


def prefilled(lab: Lab, prompt: tuple[int, ...], request_id: str) -> Listener:
    listener = lab.submit(make_spec(prompt, request_id=request_id, source=Source.PREFILL_ONLY))
    listener.token()
    return listener


def rows_of(listener: Listener) -> dict[int, np.ndarray]:
    """Every layer's rows; they must come in order."""
    layers: dict[int, list[np.ndarray]] = {}
    for event in listener.rows():
        parts = layers.setdefault(event.layer_idx, [])
        assert event.first_token_idx == sum(len(part) for part in parts)
        parts.append(event.rows_TB)
    return {layer_idx: np.concatenate(parts) for layer_idx, parts in layers.items()}


def test_prefill_worker_reuses_and_still_sends_every_row() -> None:
    with open_engine("default") as lab:
        first, second = prefilled(lab, PROMPT, "first"), prefilled(lab, PROMPT, "second")
        assert computed(lab) == 22
        assert second.events[-1].num_cached_tokens == 20
        one, other = rows_of(first), rows_of(second)
        assert list(one) == list(other) == [0, 1, 2]
        assert all(np.array_equal(one[layer], other[layer]) for layer in one)
        assert {len(rows) for rows in other.values()} == {21}


def test_tokens_that_either_worker_had_count_as_cached() -> None:
    with open_engine("default") as lab:
        prefilled(lab, PROMPT, "first")
        given = prefilled(lab, PROMPT, "second")
    with open_engine("default") as lab:
        to = lab.submit(make_spec(PROMPT, source=Source.REMOTE)).admitted()
        for rows in given.rows():
            lab.engine.add_rows(to.spec.key, rows)
        lab.engine.finish_transfer(to.spec.key, given.events[-1])
        assert len(to.tokens()) == 8
        assert first_token(to).num_cached_tokens == 20


@pytest.mark.parametrize("num_tokens", [20, 21])
def test_prompt_that_is_all_here_needs_no_prefill_worker(num_tokens: int) -> None:
    """With 20 tokens every page is a shared one, and the row that the logits come from is computed again."""
    with open_engine("default") as lab:
        expected = lab.run(PROMPT[:num_tokens])
        to = lab.submit(make_spec(PROMPT[:num_tokens], source=Source.REMOTE)).admitted()
        lab.engine.compute_here(to.spec.key)
        assert to.tokens() == expected


def test_received_pages_are_shared_and_not_written_again() -> None:
    """Garbage in the rows of pages that are here already does no harm: they are not taken from the wire."""
    with open_engine("default") as lab:
        given = prefilled(lab, PROMPT, "given")
        expected = lab.run(PROMPT, request_id="local")
    with open_engine("default") as lab:
        texts = []
        for request_id in ("first", "second"):
            to = lab.submit(make_spec(PROMPT, request_id=request_id, source=Source.REMOTE)).admitted()
            for rows in given.rows():
                lab.engine.add_rows(to.spec.key, rows)
            lab.engine.finish_transfer(to.spec.key, given.events[-1])
            texts.append(to.tokens())
        assert texts == [expected] * 2
        assert lab.metric("prefix_hit_tokens_total") == 20
        assert lab.run(PROMPT) == expected
        assert computed(lab) == 1


@settings(max_examples=12)
@given(data=st.data())
def test_random_requests_with_common_prefixes_equal_each_alone(data: st.DataObject) -> None:
    """Prompts out of few words, so that prefixes coincide; pools so small that pages are given away."""
    shape = data.draw(st.sampled_from(["default", "sparse"]))
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    words = [rng.choices(range(3, 320), k=rng.randint(1, 9)) for _ in range(3)]
    prompts = [[t for word in rng.choices(words, k=rng.randint(1, 5)) for t in word] for _ in range(8)]
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randint(0, 9))
    with open_engine(shape, prefix_reuse=False) as lab:
        alone = [lab.run(prompt, max_tokens=6, sampling=sampling) for prompt in prompts]
    group = {
        "num_pages": data.draw(st.sampled_from([14, 25, 128])),
        "max_step_tokens": data.draw(st.sampled_from([3, 8, 64])),
        "max_batch_requests": data.draw(st.sampled_from([1, 4])),
    }
    with open_engine(shape, **group) as lab:
        listeners = [
            lab.submit(make_spec(prompt, request_id=str(i), max_tokens=6, sampling=sampling))
            for i, prompt in enumerate(prompts)
        ]
        assert [listener.tokens() for listener in listeners] == alone
        lab.is_empty()
