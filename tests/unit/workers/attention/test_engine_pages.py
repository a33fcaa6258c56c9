"""The engine's pages and refusals: whatever becomes of a sequence, its pages come back."""

import threading

import pytest

from tests.reference_data import goldens
from tests.unit.workers.attention.harness import make_spec, open_engine
from wire.errors import InternalError, InvalidRequest, Overloaded, PromptTooLong, WorkerLost
from workers.attention.residents import Residents
from workers.attention.scoring import ScoreSpec
from workers.attention.types import ChosenToken, SequenceState, Source

PROMPT = tuple(range(3, 24))


def test_more_requests_than_pages_all_finish_in_order() -> None:
    """Each needs 7 of 16 pages: two at a time, the oldest first."""
    with open_engine("default", num_pages=16, prefix_reuse=False) as lab:
        expected = lab.run(PROMPT)
        lab.door.hold()
        with lab.pause():
            listeners = [lab.submit(make_spec(PROMPT, request_id=str(i))) for i in range(6)]
        lab.until_metric(14, "pages", state="used")
        assert [listener.is_silent() for listener in listeners] == [False] * 2 + [True] * 4
        lab.door.open()
        assert [listener.tokens() for listener in listeners] == [expected] * 6


def test_big_request_is_not_overtaken_for_ever() -> None:
    with open_engine("default", num_pages=8) as lab:
        lab.door.hold()
        first = lab.submit(make_spec(PROMPT, request_id="first"))
        big = lab.submit(make_spec(PROMPT, request_id="big", max_tokens=12))
        small = lab.submit(make_spec([5], request_id="small", max_tokens=1))
        lab.door.step(2)
        first.token()
        first.token()
        assert small.is_silent()
        lab.door.open()
        assert len(first.tokens()) == 8
        assert len(big.tokens()) == 12
        assert len(small.tokens()) == 1


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode"])
def test_cancel_frees_the_pages(state: str) -> None:
    """Steps of 5 tokens: a prompt of 21 takes five of them."""
    with open_engine("default", num_pages=16, max_step_tokens=5, prefix_reuse=False) as lab:
        lab.door.hold()
        owner = (
            lab.submit(make_spec(PROMPT, request_id="owner", max_tokens=40)) if state == "waiting" else None
        )
        victim = lab.submit(make_spec(PROMPT, request_id="victim", max_tokens=40))
        lab.door.step({"waiting": 1, "prefill": 2, "decode": 6}[state])
        if state == "decode":
            victim.token()
        lab.until_metric(1, "requests", state=state)
        lab.until_metric(15, "pages", state="used")
        lab.engine.cancel(victim.spec)
        if owner is not None:
            lab.engine.cancel(owner.spec)
        lab.door.step()
        lab.is_empty()
        assert lab.metric("requests", state=state) == 0
        lab.door.open()
        assert len(lab.run(PROMPT, max_tokens=40)) == 40


def test_cancel_of_one_leaves_the_others() -> None:
    golden = goldens("default")[2]
    with open_engine("default") as lab:
        lab.door.hold()
        kept = lab.submit(make_spec(golden.prompt, request_id="kept", max_tokens=16))
        gone = lab.submit(make_spec(PROMPT, request_id="gone", max_tokens=40))
        lab.door.step(3)
        kept.token()
        lab.engine.cancel(gone.spec)
        lab.engine.cancel(make_spec(PROMPT, request_id="never there"))
        lab.engine.cancel(make_spec(golden.prompt, request_id="kept", attempt=1, max_tokens=16))
        lab.door.step()
        lab.until_metric(1, "requests", state="decode")
        lab.door.open()
        assert kept.tokens() == golden.tensor("greedy").tolist()


def test_same_key_twice_is_refused_and_the_first_goes_on() -> None:
    """Also when the second gives up, as its caller does on being refused."""
    golden = goldens("default")[1]
    with open_engine("default") as lab:
        lab.door.hold()
        first = lab.submit(make_spec(golden.prompt, max_tokens=16))
        second = lab.submit(make_spec(golden.prompt, max_tokens=16))
        other_attempt = lab.submit(make_spec(golden.prompt, max_tokens=16, attempt=1))
        lab.door.step()
        error = second.error()
        assert isinstance(error, InvalidRequest)
        assert (error.field, "running already" in error.message) == ("request_id", True)
        lab.engine.cancel(second.spec)
        lab.door.open()
        assert first.tokens() == other_attempt.tokens() == golden.tensor("greedy").tolist()


def test_key_may_come_again_when_it_is_over() -> None:
    with open_engine("default") as lab:
        texts = [lab.submit(make_spec(PROMPT)).tokens() for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "source", "fits"),
    [
        (21, 12, Source.LOCAL, True),
        (21, 13, Source.LOCAL, False),
        (32, 99, Source.PREFILL_ONLY, True),
        (33, 1, Source.PREFILL_ONLY, False),
    ],
)
def test_what_never_fits_the_pages_is_refused_by_field(
    num_tokens: int, max_tokens: int, source: Source, fits: bool
) -> None:
    """8 pages of 4 tokens: 32 rows; the last new token needs none, a prefill needs those of its prompt."""
    with open_engine("default", num_pages=8) as lab:
        listener = lab.submit(make_spec([5] * num_tokens, max_tokens=max_tokens, source=source))
        if fits:
            assert listener.token()
            lab.engine.cancel(listener.spec)
        else:
            error = listener.error()
            assert isinstance(error, PromptTooLong)
            assert error.field == "max_tokens"
            assert "needs 9 KV pages of 4 tokens, the worker has 8" in error.message


@pytest.mark.parametrize(
    ("raised", "told"), [(WorkerLost("expert-1 is gone"), WorkerLost), (ValueError("boom"), InternalError)]
)
def test_failed_step_fails_its_sequences_only(
    raised: Exception, told: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Three sequences, pages for two: those two fail, the third runs as if nothing had been."""
    with open_engine("default", num_pages=14, prefix_reuse=False) as lab:
        expected = lab.run(PROMPT)
        lab.door.hold()
        failing = [lab.submit(make_spec(PROMPT, request_id=str(i))) for i in range(2)]
        waiting = lab.submit(make_spec(PROMPT, request_id="waiting"))
        for listener in failing:
            listener.admitted()
        lab.door.error = raised
        lab.door.open()
        for listener in failing:
            error = listener.error()
            assert isinstance(error, told)
            assert str(raised) in error.message
        assert waiting.tokens() == expected


def test_sequence_that_ended_in_a_failing_step_is_not_failed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends with this step's token; taking the second's breaks."""
    append = Residents.append

    def breaks_for_the_second(residents: Residents, sequence: SequenceState, token: ChosenToken) -> None:
        if sequence.spec.key[0] == "second":
            raise WorkerLost("broken")
        append(residents, sequence, token)

    monkeypatch.setattr(Residents, "append", breaks_for_the_second)
    with open_engine("default") as lab:
        lab.door.hold()
        first = lab.submit(make_spec(PROMPT, request_id="first", max_tokens=1))
        second = lab.submit(make_spec(PROMPT, request_id="second", num_prompt_tokens=len(PROMPT) - 1))
        lab.door.open()
        assert isinstance(second.error(), WorkerLost)
        assert len(first.tokens()) == 1
        lab.check()
        assert first.is_silent()


def test_stop_fails_what_is_open_and_what_comes_behind_it() -> None:
    with open_engine("default", num_pages=8) as lab:
        lab.door.hold()
        running = lab.submit(make_spec(PROMPT, request_id="running"))
        waiting = lab.submit(make_spec(PROMPT, request_id="waiting"))
        lab.door.step()
        running.token()
        lab.until(lambda: lab.door.num_arrivals == 2)
        stopping = threading.Thread(target=lab.engine.stop)
        stopping.start()
        lab.until(lambda: not lab.engine._commands.empty())
        late = lab.submit(make_spec(PROMPT, request_id="late"))
        lab.door.open()
        stopping.join(timeout=30)
        for listener in (running, waiting, late):
            error = listener.error()
            assert isinstance(error, Overloaded)
            assert "shutting down" in error.message
        assert lab.metric("pages", state="used") == 0


def test_score_that_does_not_fit_now_is_overloaded() -> None:
    with open_engine("default", num_pages=8) as lab:
        lab.door.hold()
        owner = lab.submit(make_spec(PROMPT)).admitted()
        score = lab.engine.score(ScoreSpec(token_ids=PROMPT, chunk_tokens=9))
        lab.door.open()
        with pytest.raises(Overloaded, match="free pages do not hold the prompt"):
            score.result(timeout=30)
        assert len(owner.tokens()) == 8
        again = lab.engine.score(ScoreSpec(token_ids=PROMPT, chunk_tokens=9))
        assert again.result(timeout=30)["logits"].shape == (21, 320)


def test_score_that_never_fits_is_too_long() -> None:
    """Not Overloaded: a retry would wait for ever."""
    with open_engine("default", num_pages=2) as lab:
        score = lab.engine.score(ScoreSpec(token_ids=PROMPT, chunk_tokens=9))
        with pytest.raises(PromptTooLong, match="the worker has 2") as caught:
            score.result(timeout=30)
        assert caught.value.field == "tokens"
        lab.is_empty()


def test_score_that_fails_frees_its_pages() -> None:
    with open_engine("default") as lab:
        lab.door.error = WorkerLost("gone")
        with pytest.raises(WorkerLost, match="gone"):
            lab.engine.score(ScoreSpec(token_ids=PROMPT, chunk_tokens=9)).result(timeout=30)
        lab.is_empty()


def test_score_that_nobody_waits_for_is_not_computed() -> None:
    """A caller that gives up must not bring the engine down with it."""
    with open_engine("default") as lab:
        lab.door.hold()
        owner = lab.submit(make_spec(PROMPT)).admitted()
        score = lab.engine.score(ScoreSpec(token_ids=PROMPT, chunk_tokens=9))
        assert score.cancel()
        checked = lab.engine.check_integrity()
        assert checked.cancel()
        lab.door.open()
        assert len(owner.tokens()) == 8
        assert len(lab.run(PROMPT)) == 8


def test_integrity_check_names_pages_without_a_sequence() -> None:
    with open_engine("default") as lab:
        lab.engine._pages.reserve("ghost", num_tokens=4)
        with pytest.raises(RuntimeError, match="ghost"):
            lab.check()
        lab.engine._pages.release("ghost")


def test_wrong_accounts_are_counted_when_the_last_sequence_ends(caplog: pytest.LogCaptureFixture) -> None:
    with open_engine("default") as lab:
        lab.engine._pages._free.insert(0, lab.engine._pages._free[0])
        assert len(lab.run(PROMPT)) == 8
        lab.until(lambda: lab.metric("integrity_errors_total") == 1)
        lab.engine.stop()
    assert "page accounts are wrong" in caplog.text


def test_idle_engine_shows_its_free_pages() -> None:
    with open_engine("default", num_pages=16) as lab:
        lab.until_metric(16, "pages", state="free")


def test_requests_and_tokens_are_counted() -> None:
    with open_engine("default", num_pages=16) as lab:
        lab.run(PROMPT, max_tokens=8)
        lab.is_empty()
        assert lab.metric("tokens_total", phase="prefill") == 21
        assert lab.metric("tokens_total", phase="decode") == 7
        assert (lab.metric("pages", state="free"), lab.metric("pages", state="cached")) == (9, 7)
        assert lab.metric("step_tokens_sum") == 28
