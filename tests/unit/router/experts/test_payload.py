"""Payload forms: what is sent is what is read, within each form's error; what does not fit is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experts.payload import (
    PayloadForms,
    encode_rows,
    encode_sums,
    forward_tensors,
    max_reply_bytes,
    read_forward,
    read_partial,
)
from router.experts.plan import WorkerCall
from wire.errors import FrameInvalid
from wire.frames import Frame, FrameKind, decode_frame, encode_frame

HIDDEN = 200
RELATIVE_ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "fp8": 2.0**-4}
"""Of one value: half a step of 24, 8 and 4 bits; in FP8 of values near the largest of their group."""
SUM_ERROR = {"exact": 0.0, "fp32": 2.0**-24, "bf16": 2.0**-8 + 2.0**-24}
ROW_FORMS = tuple(RELATIVE_ERROR)
SUM_FORMS = tuple(SUM_ERROR)


def call_of(token_idx_R: list[int], num_pairs: int = 4) -> WorkerCall:
    rng = np.random.default_rng(len(token_idx_R))
    return WorkerCall(
        worker_id="w",
        token_idx_R=np.array(token_idx_R, dtype=np.int64),
        row_idx_A=rng.integers(0, len(token_idx_R), num_pairs, dtype=np.int32),
        expert_idx_A=rng.integers(0, 9, num_pairs, dtype=np.int32),
        weight_A=rng.random(num_pairs, dtype=np.float32),
    )


def forward_frame(form: str = "float32", tokens: int = 7, picked: tuple[int, ...] = (0, 3, 6)) -> Frame:
    x_TD = np.random.default_rng(1).uniform(1, 2, (tokens, HIDDEN)).astype(np.float32)
    tensors = forward_tensors(encode_rows(x_TD, form), call_of(list(picked)))
    return Frame(kind=FrameKind.FORWARD, tensors=tensors)


def partial_frame(form: str = "exact", rows: int = 3) -> tuple[np.ndarray, Frame]:
    sums_RD = np.random.default_rng(2).standard_normal((rows, HIDDEN))
    tensor = encode_sums(sums_RD, PayloadForms(sums=form).flags)
    return sums_RD, Frame(kind=FrameKind.PARTIAL, tensors=(tensor,))


def read(frame: Frame, form: str = "exact", rows: int = 3) -> np.ndarray:
    return read_partial(frame, num_rows=rows, hidden_size=HIDDEN, form=form)


@pytest.mark.parametrize("form", ROW_FORMS)
@given(picked=st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True).map(sorted))
def test_rows_are_read_as_they_were_sent(form, picked):
    x_TD = np.random.default_rng(1).uniform(1, 2, (7, HIDDEN)).astype(np.float32)
    frame = decode_frame(encode_frame(forward_frame(form, picked=tuple(picked))))
    rows = read_forward(frame, hidden_size=HIDDEN)
    assert rows.x_RD.dtype == np.float32
    np.testing.assert_allclose(rows.x_RD, x_TD[picked], rtol=RELATIVE_ERROR[form])
    call = call_of(picked)
    np.testing.assert_array_equal(rows.row_idx_A, call.row_idx_A)
    np.testing.assert_array_equal(rows.expert_idx_A, call.expert_idx_A)
    np.testing.assert_array_equal(rows.weight_A, call.weight_A)


@pytest.mark.parametrize("form", ROW_FORMS)
def test_row_is_the_same_whatever_is_encoded_beside_it(form):
    """A retry encodes the rows again, perhaps with others."""
    x_TD = np.random.default_rng(5).standard_normal((9, HIDDEN), dtype=np.float32)
    alone = encode_rows(x_TD[4:5], form)
    for part, together in zip(alone, encode_rows(x_TD, form), strict=True):
        np.testing.assert_array_equal(part[0], together[4])


@pytest.mark.parametrize("form", SUM_FORMS)
def test_sums_are_read_as_they_were_sent(form):
    sums_RD, frame = partial_frame(form)
    got = read(decode_frame(encode_frame(frame)), form)
    assert got.dtype == (np.float64 if form == "exact" else np.float32)
    np.testing.assert_allclose(got, sums_RD, rtol=SUM_ERROR[form])


@pytest.mark.parametrize("form", SUM_FORMS)
def test_answer_fits_into_the_bytes_foreseen(form):
    request = forward_frame("fp8")
    assert len(encode_frame(partial_frame(form)[1])) <= max_reply_bytes(request)


@pytest.mark.parametrize("asked", SUM_FORMS)
@pytest.mark.parametrize("answered", SUM_FORMS)
def test_sums_of_another_form_are_refused(asked, answered):
    _, frame = partial_frame(answered)
    if asked == answered:
        read(frame, asked)
        return
    with pytest.raises(FrameInvalid, match="wanted") as caught:
        read(frame, asked)
    assert caught.value.field == "shape"


@pytest.mark.parametrize("form", SUM_FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_sums_that_are_no_number_are_refused(form, value):
    sums_RD, _ = partial_frame()
    sums_RD[1, 7] = value
    frame = Frame(kind=FrameKind.PARTIAL, tensors=(encode_sums(sums_RD, PayloadForms(sums=form).flags),))
    if form == "exact" and value == 1e300:
        assert read(frame)[1, 7] == value
        return
    with pytest.raises(FrameInvalid, match="NaN or infinite") as caught:
        read(frame, form)
    assert caught.value.field == "nonfinite"


def with_tensor(frame: Frame, idx: int, array: np.ndarray) -> Frame:
    tensors = list(frame.tensors)
    tensors[idx] = array
    return replace(frame, tensors=tuple(tensors))


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (replace(forward_frame(), kind=FrameKind.PARTIAL), "got PARTIAL"),
        (replace(forward_frame(), tensors=()), "wanted FORWARD"),
        (replace(forward_frame("fp8"), tensors=forward_frame("fp8").tensors[:4]), "and scales of fp8"),
        (replace(forward_frame(), tensors=forward_frame("fp8").tensors[:1]), "wanted FORWARD"),
        (replace(forward_frame(), tensors=(*forward_frame().tensors, np.ones((3, 2), np.float32))), "wanted"),
        (with_tensor(forward_frame(), 0, np.zeros((3, HIDDEN), np.int32)), "int32"),
        (with_tensor(forward_frame("fp8"), 4, np.ones((3, 1), np.float32)), r"scales have shape \(3, 1\)"),
        (with_tensor(forward_frame("fp8"), 4, np.ones(6, np.float32)), r"scales have shape \(6,\)"),
        (with_tensor(forward_frame("bfloat16"), 0, np.zeros((3, 9), np.uint16)), r"rows have shape \(3, 9\)"),
    ],
)
def test_forward_that_does_not_fit_is_refused(frame, what):
    with pytest.raises(FrameInvalid, match=what):
        read_forward(frame, hidden_size=HIDDEN)
