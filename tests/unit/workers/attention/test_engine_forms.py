"""Texts with a compact cache: another than with FP32, perhaps, but the same however they are computed."""

import functools

import pytest

from model.checkpoint import Checkpoint
from model.summary import summarise
from tests.reference_data import checkpoint_dir, goldens
from tests.unit.workers.attention.harness import make_spec, open_engine
from workers.attention.cache import CacheForm
from workers.attention.types import Source

FORMS: tuple[CacheForm, ...] = ("bfloat16", "fp8")
SHAPES = ("default", "sparse", "mtp")
NUM_TOKENS = 16


def prompts(shape: str) -> list[list[int]]:
    return [list(golden.prompt) for golden in goldens(shape)[:3]]


@functools.cache
def alone(shape: str, form: CacheForm) -> list[list[int]]:
    """The text of each prompt in an engine of its own, in one chunk."""
    texts = []
    for prompt in prompts(shape):
        with open_engine(shape, kv={"dtype": form}, prefix_reuse=False) as lab:
            texts.append(lab.run(prompt, max_tokens=NUM_TOKENS))
    return texts


@pytest.mark.parametrize("max_step_tokens", [3, 16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_chunks_and_reuse_change_no_token(shape: str, form: CacheForm, max_step_tokens: int) -> None:
    """All prompts at once and in small steps, and again when their pages are cached."""
    with open_engine(
        shape, kv={"dtype": form}, max_step_tokens=max_step_tokens, max_drafts=2 if shape == "mtp" else 0
    ) as lab:
        for round_idx in range(2):
            listeners = [
                lab.submit(make_spec(prompt, request_id=f"{round_idx}-{i}", max_tokens=NUM_TOKENS))
                for i, prompt in enumerate(prompts(shape))
            ]
            assert [listener.tokens() for listener in listeners] == alone(shape, form)
        assert lab.metric("prefix_hit_tokens_total") > 0


@pytest.mark.parametrize("form", FORMS)
def test_hand_over_changes_no_token(form: CacheForm) -> None:
    prompt = prompts("default")[2]
    with open_engine("default", kv={"dtype": form}, max_step_tokens=16) as lab:
        given = lab.submit(make_spec(prompt, source=Source.PREFILL_ONLY))
        first = given.token()
    with open_engine("default", kv={"dtype": form}) as lab:
        to = lab.submit(make_spec(prompt, source=Source.REMOTE, max_tokens=NUM_TOKENS)).admitted()
        for rows in given.rows():
            assert rows.rows_TB.dtype.name == lab.engine.cache.dtype_name
            lab.engine.add_rows(to.spec.key, rows)
        lab.engine.finish_transfer(to.spec.key, first)
        assert to.tokens() == alone("default", form)[2]


@pytest.mark.parametrize("form", ["float32", *FORMS])
def test_bytes_of_a_token_are_told_and_are_those_of_inspect(form: CacheForm) -> None:
    with open_engine("mtp", kv={"dtype": form}) as lab:
        told = lab.metric("kv_token_bytes")
    assert told == summarise(Checkpoint.open(checkpoint_dir("mtp"))).kv_bytes_by_form[form]
