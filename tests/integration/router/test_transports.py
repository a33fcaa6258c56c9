"""What every transport must do, whoever is at the other end: one suite, run for each of them."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.experts import local_transport
from router.experts.connect import TransportKind, is_this_host, make_transport
from router.experts.payload import PayloadForms, encode_rows, encode_sums, read_forward, read_partial
from tests.integration.router.fake_workers import (
    ANSWER_S,
    FAKES,
    Behaviour,
    FakeWorker,
    Link,
    answer,
)
from wire.errors import ExpertNotLoaded, FrameInvalid, WorkerLost
from wire.frames import Frame, FrameKind, Part, encode_frame
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import control_pb2
from wire.same_host import Block, create_block
from workers.expert.local_server import LocalServer

HIDDEN = 256
HANDSHAKE = Handshake(model="f00d")


def call_frame(seed: int = 0, *, rows: int = 3, form: str = "float32", flags: int = 0) -> Frame:
    rng = np.random.default_rng(seed)
    values, *scales = encode_rows(rng.standard_normal((rows, HIDDEN), dtype=np.float32), form)
    pairs = (np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32), np.ones(rows, np.float32))
    return Frame(
        kind=FrameKind.FORWARD,
        tensors=(values, *pairs, *scales),
        table_version=9,
        layer_idx=seed,
        flags=flags,
    )


def partial(call: Frame) -> Frame:
    """A worker's answer without a model: the rows themselves, in FP64."""
    sums = encode_sums(read_forward(call, hidden_size=HIDDEN).x_RD.astype(np.float64), call.flags)
    return replace(call, kind=FrameKind.PARTIAL, tensors=(sums,), flags=0)


def honest(link: Link, call: Frame) -> None:
    answer(link, call, partial(call))


class Lab:
    """A transport under test and the workers it reaches."""

    def __init__(self, kind: TransportKind) -> None:
        self.kind: str = kind
        self.metrics = Metrics("attention")
        self.workers: dict[str, FakeWorker] = {}
        self.transport = make_transport(kind, HANDSHAKE, self.metrics)

    def start(self, name: str = "a", behaviour: Behaviour = honest, *, port: int = 0) -> FakeWorker:
        worker = self.workers[name] = FAKES[self.kind](behaviour, port=port)
        self.announce()
        return worker

    def announce(self) -> None:
        self.transport.update_members(
            control_pb2.Member(worker_id=name, role=control_pb2.ROLE_EXPERT, address=worker.address)
            for name, worker in self.workers.items()
        )

    def send(self, frame: Frame, name: str = "a") -> "Future[Frame]":
        return self.transport.send(name, frame)

    def dropped(self, reason: str) -> float:
        labels = {"reason": reason}
        name = "moray_attention_dispatch_dropped_total"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def close(self) -> None:
        self.transport.close()
        for worker in self.workers.values():
            worker.stop()


@pytest.fixture(params=["grpc", "local", "torch"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    made = Lab(request.param)
    yield made
    made.close()


def error_of(future: "Future[Frame]") -> BaseException | None:
    return future.exception(timeout=ANSWER_S)


@pytest.mark.parametrize("rows", [0, 1, 64])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("sums", ["exact", "fp32", "bf16"])
def test_rows_and_sums_of_every_form_arrive_bit_for_bit(lab: Lab, rows: int, form: str, sums: str) -> None:
    seen: list[Frame] = []

    def keep(link: Link, call: Frame) -> None:
        seen.append(call)
        honest(link, call)

    lab.start(behaviour=keep)
    call = call_frame(rows, rows=rows, form=form, flags=PayloadForms(sums=sums).flags)
    reply = lab.send(call).result(timeout=ANSWER_S)
    assert [(t.dtype, t.shape, t.tobytes()) for t in seen[0].tensors] == [
        (t.dtype, t.shape, t.tobytes()) for t in call.tensors
    ]
    assert (seen[0].layer_idx, seen[0].table_version, seen[0].flags) == (rows, 9, call.flags)
    wanted = partial(call).tensors[0]
    assert (reply.tensors[0].dtype, reply.tensors[0].tobytes()) == (wanted.dtype, wanted.tobytes())
    read_partial(reply, num_rows=rows, hidden_size=HIDDEN, form=sums)


def test_many_calls_in_flight_each_get_their_own_answer(lab: Lab) -> None:
    lab.start()
    calls = [call_frame(seed, rows=1 + seed % 7) for seed in range(100)]
    futures = [lab.send(call) for call in calls]
    for call, future in zip(calls, futures, strict=True):
        np.testing.assert_array_equal(future.result(timeout=ANSWER_S).tensors[0], call.tensors[0])


def test_answers_that_are_kept_stay_what_they_were(lab: Lab) -> None:
    """Memory of an answer is not used again while anyone reads it."""
    lab.start()
    kept = [lab.send(call_frame(seed)).result(timeout=ANSWER_S) for seed in range(20)]
    for seed, reply in enumerate(kept):
        np.testing.assert_array_equal(reply.tensors[0], call_frame(seed).tensors[0])


def test_answers_in_another_order_find_their_calls(lab: Lab) -> None:
    held: list[tuple[Link, Frame]] = []

    def reverse(link: Link, call: Frame) -> None:
        held.append((link, call))
        if len(held) == 5:
            for each in reversed(held):
                honest(*each)

    lab.start(behaviour=reverse)
    futures = [lab.send(call_frame(seed)) for seed in range(5)]
    for seed, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(timeout=ANSWER_S).tensors[0], call_frame(seed).tensors[0])


def test_slow_peer_does_not_delay_another(lab: Lab) -> None:
    may_answer = threading.Event()

    def slow(link: Link, call: Frame) -> None:
        may_answer.wait(ANSWER_S)
        honest(link, call)

    lab.start("slow", slow)
    lab.start("quick")
    waiting = lab.send(call_frame(1), "slow")
    for seed in range(10):
        lab.send(call_frame(seed), "quick").result(timeout=ANSWER_S)
    assert not waiting.done()
    may_answer.set()
    assert waiting.result(timeout=ANSWER_S).kind is FrameKind.PARTIAL


def test_error_of_a_worker_is_told_to_its_call_only(lab: Lab) -> None:
    def refuse_odd(link: Link, call: Frame) -> None:
        meta = b"ExpertNotLoaded: layer 1 is not here"
        wrong = Frame(kind=FrameKind.ERROR, call_id=call.call_id, meta=meta)
        answer(link, call, wrong if call.layer_idx % 2 else partial(call))

    lab.start(behaviour=refuse_odd)
    futures = [lab.send(call_frame(seed)) for seed in range(4)]
    assert [type(error_of(future)) for future in futures] == [type(None), ExpertNotLoaded] * 2


def silent(link: Link, call: Frame) -> None:
    """Never answers."""


def hang_up(link: Link, call: Frame) -> None:
    link.hang_up()


def half_close(link: Link, call: Frame) -> None:
    link.end()


@pytest.mark.parametrize("fail", [hang_up, half_close])
def test_peer_that_ends_the_stream_loses_all_its_calls(lab: Lab, fail: Behaviour) -> None:
    def third_call(link: Link, call: Frame) -> None:
        if call.layer_idx == 2:
            fail(link, call)

    lab.start(behaviour=third_call)
    errors = [error_of(future) for future in [lab.send(call_frame(seed)) for seed in range(3)]]
    assert [type(error) for error in errors] == [WorkerLost] * 3
    assert all(error.is_retryable for error in errors if isinstance(error, WorkerLost))


def damaged(link: Link, call: Frame) -> None:
    data = bytearray(encode_frame(partial(call)))
    data[17] ^= 4  # of the table's version: the bodies that stay in one host's memory have no checksum
    link.answer(call, bytes(data))


def garbage(link: Link, call: Frame) -> None:
    link.answer(call, b"what is this? " * 20)


def of_another_call(link: Link, call: Frame) -> None:
    answer(link, call, replace(partial(call), call_id=call.call_id + 1000))


@pytest.mark.parametrize(
    ("lie", "reason"), [(damaged, "checksum"), (garbage, "layout"), (of_another_call, "call")]
)
def test_answer_that_cannot_be_read_is_refused_and_counted_and_the_next_call_reconnects(
    lab: Lab, lie: Behaviour, reason: str
) -> None:
    lies = iter([True])

    def lie_once(link: Link, call: Frame) -> None:
        (lie if next(lies, False) else honest)(link, call)

    lab.start(behaviour=lie_once)
    assert isinstance(error_of(lab.send(call_frame(1))), FrameInvalid)
    assert lab.dropped(reason) == 1
    assert lab.send(call_frame(2)).result(timeout=ANSWER_S).layer_idx == 2


def damage_frames(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Flips a bit in the middle of those of the frames that are written to shared memory from now on."""
    num_written, write = itertools.count(), Block.write

    def damage(block: Block, parts: Iterable[Part], *, num_bytes: int) -> bool:
        is_written = write(block, parts, num_bytes=num_bytes)
        if next(num_written) in numbers:
            block.memory[num_bytes // 2] ^= 1
        return is_written

    monkeypatch.setattr(Block, "write", damage)


@pytest.mark.parametrize("is_summed", [True, False], ids=["summed", "not summed"])
@pytest.mark.parametrize("number", [0, 1], ids=["call", "answer"])
def test_damaged_shared_memory_is_found_where_bodies_are_summed(
    monkeypatch: pytest.MonkeyPatch, number: int, is_summed: bool
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        server = LocalServer(address, handshake=HANDSHAKE, submit=lambda call, reply: reply(partial(call)))
        metrics = Metrics("attention")
        transport = make_transport("local", HANDSHAKE, metrics, local_checksum=is_summed)
        transport.update_members(
            [control_pb2.Member(worker_id="a", role=control_pb2.ROLE_EXPERT, address=address)]
        )
        damage_frames(monkeypatch, number)
        answered = transport.send("a", call_frame())
        if is_summed:
            assert isinstance(error_of(answered), FrameInvalid)
        else:
            assert error_of(answered) is None
        again = transport.send("a", call_frame()).result(timeout=ANSWER_S)
        np.testing.assert_array_equal(again.tensors[0], call_frame().tensors[0])
        transport.close()
        server.close()


def test_memory_of_an_answer_carries_another_call_when_nobody_reads_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def count_blocks(block_id: int, *, num_bytes: int) -> tuple[Block, int]:
        made.append(block_id)
        return create_block(block_id, num_bytes=num_bytes)

    monkeypatch.setattr(local_transport, "create_block", count_blocks)
    lab = Lab("local")
    lab.start()
    for seed in range(30):
        lab.send(call_frame(seed)).result(timeout=ANSWER_S)
    assert len(made) <= 2, "the stream's reader may let go of an answer after the next call began"
    held = [lab.send(call_frame(seed)).result(timeout=ANSWER_S) for seed in range(5)]
    assert len(made) >= 5
    for seed, answered in enumerate(held):
        np.testing.assert_array_equal(answered.tensors[0], call_frame(seed).tensors[0])
    lab.close()


def test_unknown_worker_is_lost(lab: Lab) -> None:
    with pytest.raises(WorkerLost, match="nobody is not in the cluster"):
        lab.send(call_frame(), "nobody").result(timeout=ANSWER_S)


def test_worker_that_left_the_cluster_is_let_go(lab: Lab) -> None:
    lab.start("a", silent)
    waiting = lab.send(call_frame())
    worker = lab.workers.pop("a")
    lab.announce()
    assert isinstance(error_of(waiting), WorkerLost)
    assert isinstance(error_of(lab.send(call_frame())), WorkerLost)
    worker.stop()


def test_worker_that_starts_again_is_reached_again(lab: Lab) -> None:
    """At the same address, without anyone telling the transport; calls in between are lost, not stuck."""
    worker = lab.start()
    lab.send(call_frame(1)).result(timeout=ANSWER_S)
    worker.stop()
    assert isinstance(error_of(lab.send(call_frame(2))), WorkerLost)
    lab.workers["a"] = FAKES[lab.kind](honest, port=int(worker.address.rpartition(":")[2]))
    ends_s = time.monotonic() + ANSWER_S
    while (error := error_of(lab.send(call_frame(3)))) is not None:
        assert isinstance(error, WorkerLost)
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    assert lab.send(call_frame(4)).result(timeout=ANSWER_S).layer_idx == 4


def test_close_fails_open_calls(lab: Lab) -> None:
    lab.start(behaviour=silent)
    futures = [lab.send(call_frame(seed)) for seed in range(3)]
    lab.transport.close()
    assert [type(error_of(future)) for future in futures] == [WorkerLost] * 3


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def until(is_so: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + ANSWER_S
    while not is_so() and time.monotonic() < ends_s:
        time.sleep(0.01)
    return is_so()


@pytest.mark.parametrize("kind", ["grpc", "local", "torch"])
def test_streams_leave_no_threads_and_no_files(kind: TransportKind, caplog: pytest.LogCaptureFixture) -> None:
    """Broken ones, too: each of them was replaced when the next call came."""
    caplog.set_level("CRITICAL")  # a log that is kept keeps its errors, and they what they are about

    def round_of_failures() -> None:
        lab = Lab(kind)
        lies = iter([damaged, hang_up, half_close, honest] * 2)

        def lie(link: Link, call: Frame) -> None:
            next(lies)(link, call)

        lab.start(behaviour=lie)
        for seed in range(8):
            wait([lab.send(call_frame(seed))], timeout=ANSWER_S)
        lab.close()

    round_of_failures()  # what libraries open once, they may keep
    num_before = num_files()
    for _ in range(3):
        round_of_failures()
    assert until(lambda: num_files() <= num_before)
    assert [t.name for t in threading.enumerate() if t.name.startswith("experts")] == []


def test_call_to_a_worker_that_reads_nothing_does_not_block(lab: Lab) -> None:
    """A stopped process reads nothing: senders must stay free to turn to others."""
    may_read = threading.Event()

    def stop_reading(link: Link, call: Frame) -> None:
        may_read.wait(ANSWER_S)

    lab.start(behaviour=stop_reading)
    futures = [lab.send(call_frame(seed, rows=8)) for seed in range(1000)]
    lab.start("b")
    lab.send(call_frame(1), "b").result(timeout=ANSWER_S)
    may_read.set()
    lab.transport.close()
    assert {error_of(future).is_retryable for future in futures} == {True}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fake", "num_fallbacks"), [("local", 0), ("grpc", 1)], ids=["socket there", "socket not there"]
)
@pytest.mark.parametrize("kind", ["auto", "local"])
def test_worker_of_this_host_is_reached_through_its_socket_or_else_over_grpc(
    kind: TransportKind, fake: str, num_fallbacks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where one of them listens, the other does not."""
    lab = Lab(kind)
    lab.kind = fake
    lab.start("a")
    for seed in range(3):
        assert lab.send(call_frame(seed)).result(timeout=ANSWER_S).layer_idx == seed
    name = "moray_attention_dispatch_fallbacks_total"
    assert lab.metrics.registry.get_sample_value(name) == num_fallbacks
    assert caplog.text.count("is reached over gRPC") == num_fallbacks
    lab.close()


@pytest.mark.parametrize(
    ("address", "is_here"), [("127.0.0.1:50", True), ("[::1]:50", None), ("192.0.2.7:50", False)]
)
def test_address_of_this_host_is_told_from_others(address: str, is_here: bool | None) -> None:
    """192.0.2.0/24 is nobody's; whether there is IPv6 depends on the host, but it must not raise."""
    assert is_this_host(address) in ((True, False) if is_here is None else (is_here,))
