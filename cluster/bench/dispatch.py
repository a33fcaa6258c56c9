"""How long a dispatch travels when nobody computes: each transport beside what it cannot be quicker than.

Same host: two copies of the bytes and two wake-ups of a process. gRPC: a bidirectional stream of plain bytes.
torch.distributed is shown without one. A way and its baseline take turns, round by round; one other process
is at the far end of all of them.
"""

import json
import mmap
import os
import platform
import queue
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from cluster.bench.dispatch_peer import HALF_BYTES, HANDSHAKE, PLAIN_METHOD, WAKE
from router.experts.connect import TransportKind, make_transport
from router.experts.payload import RowForm, encode_rows
from wire.frames import Frame, FrameKind
from wire.metrics import Metrics
from wire.proto import control_pb2
from wire.rpc import CHANNEL_OPTIONS

_WARM_UP = 30
_ANSWER_S = 30
_PAIRS_PER_ROW = 4
_WORKER = "peer"
RoundTrip = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class DispatchCase:
    """The size of a call."""

    name: str
    num_rows: int
    hidden_size: int
    form: RowForm

    @property
    def there_bytes(self) -> int:
        """Of the rows alone."""
        return self.num_rows * self.hidden_size * {"float32": 4, "bfloat16": 2, "fp8": 1}[self.form]

    @property
    def back_bytes(self) -> int:
        """FP8 rows come back as they went, others as exact sums."""
        return self.num_rows * self.hidden_size * (1 if self.form == "fp8" else 8)


CASES = (
    DispatchCase(name="64 rows of 7,168, FP8 both ways", num_rows=64, hidden_size=7168, form="fp8"),
    DispatchCase(name="bench-1b: 32 rows of 1,024, exact", num_rows=32, hidden_size=1024, form="float32"),
    DispatchCase(name="bench-1b: 1 row of 1,024, exact", num_rows=1, hidden_size=1024, form="float32"),
)
BASELINES: tuple[tuple[str, str], ...] = (
    ("local", "two copies, two wake-ups"),
    ("grpc", "plain gRPC stream"),
)
"""Transport -> what it is held against."""


@dataclass(frozen=True, kw_only=True)
class RoundTrips:
    """Microseconds of many round trips of one way."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True, kw_only=True)
class DispatchReport:
    """What was measured."""

    machine: str
    rounds: int
    cases: Mapping[str, Mapping[str, RoundTrips]]
    """Case -> way -> times."""

    def ratio(self, case: str, way: str) -> float | None:
        """A transport's median over its baseline's; None of a baseline."""
        ways, baseline = self.cases[case], dict(BASELINES).get(way)
        return None if baseline is None else ways[way].p50_us / ways[baseline].p50_us

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        ratios = {case: {name: self.ratio(case, name) for name, _ in BASELINES} for case in self.cases}
        return {**asdict(self), "ratios": ratios}


def measure_dispatch(*, num_rounds: int, on_progress: Callable[[int, int], None]) -> DispatchReport:
    """Measures every case; `on_progress` is told (done, all) cases."""
    cases = {}
    with _own_cpus() as peer_cpu, _peer(peer_cpu) as peer:
        for done, case in enumerate(CASES):
            on_progress(done, len(CASES))
            with ExitStack() as stack:
                groups: tuple[Mapping[str, RoundTrip], ...] = (
                    {
                        "two copies, two wake-ups": peer.copies(case),
                        "local": peer.transport("local", case, stack),
                    },
                    {
                        "plain gRPC stream": peer.plain_stream(case, stack),
                        "grpc": peer.transport("grpc", case, stack),
                    },
                    {"torch (gloo)": peer.transport("torch", case, stack)},
                )
                found = [_take_turns(ways, num_rounds=num_rounds) for ways in groups]
            cases[case.name] = {name: times for part in found for name, times in part.items()}
        on_progress(len(CASES), len(CASES))
    return DispatchReport(machine=_machine(), rounds=num_rounds, cases=cases)


def _take_turns(ways: Mapping[str, RoundTrip], *, num_rounds: int) -> dict[str, RoundTrips]:
    spent_us: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds + _WARM_UP):
        for name, go in ways.items():
            began_s = time.perf_counter()
            go()
            spent_us[name].append((time.perf_counter() - began_s) * 1e6)
    return {
        name: RoundTrips(
            p50_us=statistics.median(times[_WARM_UP:]),
            p99_us=statistics.quantiles(times[_WARM_UP:], n=100)[98],
        )
        for name, times in spent_us.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """The other process, as this one reaches it."""

    memory: mmap.mmap
    wake: socket.socket
    worker_address: str
    plain_address: str

    def copies(self, case: DispatchCase) -> RoundTrip:
        """This process copies and wakes, the other one copies and wakes."""
        view, own = memoryview(self.memory), os.urandom(case.there_bytes)
        message = WAKE.pack(case.there_bytes, case.back_bytes)

        def go() -> None:
            view[: len(own)] = own
            self.wake.send(message)
            self.wake.recv(WAKE.size)

        return go

    def transport(self, kind: TransportKind, case: DispatchCase, stack: ExitStack) -> RoundTrip:
        """A call as the dispatcher makes it."""
        transport = make_transport(kind, HANDSHAKE, Metrics("attention"))
        stack.callback(transport.close)
        member = control_pb2.Member(
            worker_id=_WORKER, role=control_pb2.ROLE_EXPERT, address=self.worker_address
        )
        transport.update_members([member])
        frame = _call(case)
        return lambda: transport.send(_WORKER, frame).result(timeout=_ANSWER_S)

    def plain_stream(self, case: DispatchCase, stack: ExitStack) -> RoundTrip:
        """As many bytes through a stream of gRPC."""
        channel = stack.enter_context(grpc.insecure_channel(self.plain_address, options=CHANNEL_OPTIONS))
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(PLAIN_METHOD)
        answers = stream(iter(outbox.get, None))
        stack.callback(outbox.put, None)
        data = case.back_bytes.to_bytes(8, "little") + os.urandom(case.there_bytes - 8)

        def go() -> bytes:
            outbox.put(data)
            return next(answers)

        return go


@contextmanager
def _own_cpus() -> Iterator[int]:
    """Keeps this process on one CPU and gives another for the peer, as workers are who compute.

    Left to itself the scheduler runs both on one CPU in some runs and on two in others, and a wake-up across
    CPUs takes several times as long: a ratio of the two would say nothing.
    """
    before = os.sched_getaffinity(0)
    own, *others = sorted(before)
    os.sched_setaffinity(0, {own})
    try:
        yield others[0] if others else own
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _peer(cpu: int) -> Iterator[_Peer]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    file = os.memfd_create("moray-bench")
    os.ftruncate(file, 2 * HALF_BYTES)
    arguments = map(str, (file, far.fileno(), cpu))
    command = [sys.executable, "-m", "cluster.bench.dispatch_peer", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(file, far.fileno())
    ) as process:
        far.close()
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("Popen gave no pipes")
        addresses = json.loads(process.stdout.readline())
        memory = mmap.mmap(file, 2 * HALF_BYTES)
        os.close(file)
        with near:
            yield _Peer(
                memory=memory,
                wake=near,
                worker_address=addresses["worker"],
                plain_address=addresses["plain"],
            )
        process.stdin.close()


def _call(case: DispatchCase) -> Frame:
    rng = np.random.default_rng(7)
    x_RD = rng.standard_normal((case.num_rows, case.hidden_size), dtype=np.float32)
    rows, *scales = encode_rows(x_RD, case.form)
    num_pairs = case.num_rows * _PAIRS_PER_ROW
    return Frame(
        kind=FrameKind.FORWARD,
        tensors=(
            rows,
            np.repeat(np.arange(case.num_rows, dtype=np.int32), _PAIRS_PER_ROW),
            rng.integers(0, 256, num_pairs, dtype=np.int32),
            rng.random(num_pairs, dtype=np.float32),
            *scales,
        ),
    )


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
