"""Forward: the answer is the kernel's, a wrong frame gets an ERROR frame and never an exception."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.kernels.base import Assignments
from model.kernels.choose import choose_kernels
from model.matrix import Mlp, StoredMatrix
from router.experts.payload import RowForm, encode_rows, read_forward
from wire.frames import (
    FLAG_PREFILL,
    FLAG_SUMS_BF16,
    FLAG_SUMS_FP32,
    Array,
    Frame,
    FrameKind,
    decode_frame,
    encode_frame,
)
from wire.metrics import Metrics
from wire.phases import PHASES
from workers.expert.service import ExpertService
from workers.expert.slots import SlotStore
from workers.expert.types import Slot

HIDDEN, WIDTH, LAYER = 6, 4, 2
HELD = (0, 3, 4)
KERNELS = choose_kernels(num_threads=1)
"""As a worker has them."""


def load_expert(layer_idx: int, expert_idx: int) -> Mlp:
    generator = torch.Generator().manual_seed(layer_idx * 100 + expert_idx)
    gate, up, down = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(3))
    gate, up, down = (StoredMatrix(values_FD=values) for values in (gate, up, down.T.contiguous()))
    return KERNELS.pack_mlp(gate, up, down, "float32")


def load(wanted: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], Mlp]]:
    return [(place, load_expert(*place)) for place in wanted]


class Lab:
    """A service that holds experts 0, 3 and 4 of layer 2 and expert 1 of layer 5."""

    def __init__(self) -> None:
        store = SlotStore(load)
        slots = [Slot(LAYER, i, expert) for i, expert in enumerate(HELD)]
        store.prepare([*slots, Slot(5, 0, 1)], table_version=1)
        self.metrics = Metrics("expert")
        self.service = ExpertService(store, KERNELS, hidden_size=HIDDEN, metrics=self.metrics)

    def answer(self, frame: Frame) -> Frame:
        """As over the wire: the arrays are read-only views of bytes."""
        return decode_frame(encode_frame(self.service.answer(decode_frame(encode_frame(frame)))))

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"moray_expert_{name}", labels) or 0.0


@pytest.fixture
def lab() -> Lab:
    return Lab()


def forward(
    num_rows: int = 3, num_pairs: int = 5, *, seed: int = 0, experts: tuple[int, ...] = HELD
) -> Frame:
    rng = np.random.default_rng(seed)
    tensors = (
        rng.standard_normal((num_rows, HIDDEN), dtype=np.float32),
        rng.integers(0, max(num_rows, 1), num_pairs, dtype=np.int32),
        rng.choice(experts, num_pairs).astype(np.int32),
        rng.random(num_pairs, dtype=np.float32),
    )
    return Frame(kind=FrameKind.FORWARD, tensors=tensors, call_id=77, table_version=9, layer_idx=LAYER)


def with_tensor(idx: int, array: Array) -> Frame:
    tensors = list(forward().tensors)
    tensors[idx] = array
    return replace(forward(), tensors=tuple(tensors))


@given(num_rows=st.integers(1, 9), num_pairs=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_answer_equals_the_kernels_sums_bit_for_bit(num_rows: int, num_pairs: int, seed: int) -> None:
    frame = forward(num_rows, num_pairs, seed=seed)
    x, rows, experts, weights = (torch.from_numpy(tensor) for tensor in frame.tensors)
    assignments = Assignments(row_idx_A=rows.long(), expert_idx_A=experts.long(), weights_A=weights)
    wanted = KERNELS.expert_sums(x, assignments, {e: load_expert(LAYER, e) for e in HELD})
    reply = Lab().answer(frame)
    assert reply.kind is FrameKind.PARTIAL, reply.meta
    assert reply.tensors[0].dtype == np.float64
    np.testing.assert_array_equal(reply.tensors[0], wanted.numpy())


def test_answer_carries_call_table_and_layer(lab: Lab) -> None:
    reply = lab.answer(forward())
    assert (reply.call_id, reply.table_version, reply.layer_idx) == (77, 9, LAYER)


def test_no_rows_at_all_get_an_empty_answer(lab: Lab) -> None:
    reply = lab.answer(forward(0, 0))
    assert (reply.kind, reply.tensors[0].shape) == (FrameKind.PARTIAL, (0, HIDDEN))


@pytest.mark.parametrize(
    ("frame", "error", "what"),
    [
        (replace(forward(), kind=FrameKind.PARTIAL), "FrameInvalid", "got PARTIAL"),
        (replace(forward(), tensors=()), "FrameInvalid", "got FORWARD ()"),
        (replace(forward(), tensors=forward().tensors[:3]), "FrameInvalid", "wanted FORWARD with rows"),
        (replace(forward(), tensors=forward().tensors * 2), "FrameInvalid", "wanted FORWARD with rows"),
        (with_tensor(0, np.zeros((3, HIDDEN))), "FrameInvalid", "float64"),
        (with_tensor(1, np.zeros(5, np.int64)), "FrameInvalid", "int64"),
        (with_tensor(2, np.zeros(5, np.float32)), "FrameInvalid", "wanted FORWARD"),
        (with_tensor(3, np.zeros(5, np.float64)), "FrameInvalid", "float64"),
        (with_tensor(0, np.zeros((3, HIDDEN + 1), np.float32)), "FrameInvalid", "rows have shape (3, 7)"),
        (with_tensor(0, np.zeros(HIDDEN, np.float32)), "FrameInvalid", "rows have shape (6,)"),
        (with_tensor(0, np.zeros((1, 3, HIDDEN), np.float32)), "FrameInvalid", "rows have shape (1, 3, 6)"),
        (with_tensor(1, np.zeros(4, np.int32)), "FrameInvalid", "assignments have shapes (4,), (5,), (5,)"),
        (with_tensor(3, np.zeros(6, np.float32)), "FrameInvalid", "assignments have shapes (5,), (5,), (6,)"),
        (with_tensor(1, np.array([0, 1, 2, 3, 0], np.int32)), "FrameInvalid", "a row outside [0, 3)"),
        (with_tensor(1, np.array([0, 1, -1, 2, 0], np.int32)), "FrameInvalid", "a row outside [0, 3)"),
        (with_tensor(2, np.array([0, 3, 4, 1, 2], np.int32)), "ExpertNotLoaded", "layer 2: experts [1, 2]"),
        (with_tensor(2, np.array([0, 3, 4, -1, 0], np.int32)), "ExpertNotLoaded", "layer 2: experts [-1]"),
        (replace(forward(), layer_idx=5), "ExpertNotLoaded", "layer 5: experts [0, 3, 4]"),
        (replace(forward(), layer_idx=-7), "ExpertNotLoaded", "layer -7"),
    ],
    ids=str,
)
def test_frame_that_cannot_be_answered_gets_an_error_frame(
    lab: Lab, frame: Frame, error: str, what: str
) -> None:
    reply = lab.answer(frame)
    name, _, message = reply.meta.decode().partition(": ")
    assert (reply.kind, reply.call_id, name) == (FrameKind.ERROR, 77, error)
    assert what in message
    assert lab.metric("calls_total", result=error) == 1
    assert lab.metric("rows_total", phase="decode") == 0


def test_two_dimensional_assignments_are_refused(lab: Lab) -> None:
    x, rows, experts, weights = forward(num_pairs=4).tensors
    shaped = tuple(tensor.reshape(2, 2) for tensor in (rows, experts, weights))
    reply = lab.answer(replace(forward(), tensors=(x, *shaped)))
    assert reply.meta.startswith(b"FrameInvalid: assignments have shapes (2, 2)")


def test_unexpected_fault_is_an_error_frame_too(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad call must not break the stream that carries everyone's."""

    def broken(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(KERNELS, "expert_sums", broken)
    reply = lab.answer(forward())
    assert reply.kind is FrameKind.ERROR
    assert reply.meta.startswith(b"InternalError: ")
    assert b"out of memory" in reply.meta


def test_service_answers_after_an_error(lab: Lab) -> None:
    lab.answer(replace(forward(), layer_idx=5))
    assert lab.answer(forward()).kind is FrameKind.PARTIAL


def test_calls_computed_together_get_the_bits_of_each_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several attention workers' calls, one of another layer and one that is wrong among them."""
    frames = [forward(rows, 2 * rows, seed=rows) for rows in (3, 1, 9, 4)]
    frames.insert(2, replace(forward(2, 3, seed=7, experts=(1,)), layer_idx=5))
    frames.insert(1, replace(forward(), tensors=()))
    wanted = [Lab().answer(frame) for frame in frames]
    runs = []
    expert_sums = KERNELS.expert_sums
    monkeypatch.setattr(KERNELS, "expert_sums", lambda x, *rest: runs.append(len(x)) or expert_sums(x, *rest))
    answers: dict[int, Frame] = {}
    lab.service.answer_all(frames, answers.__setitem__)
    got = [answers[idx] for idx in range(len(frames))]
    assert runs == [3 + 1 + 9 + 4, 2]
    assert [(a.kind, a.layer_idx) for a in got] == [(b.kind, b.layer_idx) for b in wanted]
    assert [tensor.tobytes() for a in got for tensor in a.tensors] == [
        tensor.tobytes() for b in wanted for tensor in b.tensors
    ]
    assert lab.metric("batch_calls_sum") == 5
    assert lab.metric("batch_calls_count") == 2
    assert lab.metric("calls_total", result="FrameInvalid") == 1


@pytest.mark.parametrize(
    ("flags", "dtype"), [(0, "float64"), (FLAG_SUMS_FP32, "float32"), (FLAG_SUMS_BF16, "uint16")]
)
def test_sums_come_back_in_the_form_asked_for(lab: Lab, flags: int, dtype: str) -> None:
    reply = lab.answer(replace(forward(), flags=flags))
    assert [tensor.dtype.name for tensor in reply.tensors] == [dtype]


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_rows_of_fewer_bits_get_the_sums_of_what_they_say(lab: Lab, form: RowForm) -> None:
    rows, *rest = forward().tensors
    encoded, *scales = encode_rows(rows, form)
    sent = replace(forward(), tensors=(encoded, *rest, *scales))
    said = read_forward(sent, hidden_size=HIDDEN).x_RD
    assert not np.array_equal(said, rows)
    np.testing.assert_array_equal(lab.answer(sent).tensors[0], lab.answer(with_tensor(0, said)).tensors[0])


def test_calls_rows_and_load_are_counted(lab: Lab) -> None:
    lab.answer(forward(num_pairs=6, experts=(0,)))
    lab.answer(forward(num_pairs=2, experts=(3,)))
    lab.answer(replace(forward(num_pairs=1, experts=(0,)), flags=FLAG_PREFILL))
    assert lab.metric("calls_total", result="ok") == 3
    assert [lab.metric("rows_total", phase=phase) for phase in PHASES] == [1, 8]
    rows = lab.service.load.drain()
    assert [rows[phase][LAYER].tolist() for phase in PHASES] == [[1], [6, 0, 0, 2]]
    assert lab.metric("forward_seconds_count") == 3
