"""Round trips between two processes of one host, by every way that the same-host transport could have taken.

    .venv/bin/python benchmarks/same_host.py [--rounds N] [--json]

Each round trip writes N bytes and wakes the other process, which takes them into memory of its own and sends
as many back. Ways take turns, so that a noisy neighbour disturbs all of them; every wait is a blocking one.
shm = the bytes lie in shared memory, and a small message, an event counter or a pipe wakes the other side.
"""

import json
import mmap
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

SIZES_BYTES = (4096, 32 * 1024 * 4, 64 * 7168)
"""A small call; 32 rows of bench-1b in float32; 64 rows of DeepSeek-V3.2 in FP8."""
_WARM_UP = 20


@dataclass(frozen=True)
class End:
    """One end of a connection, in its process."""

    send: Callable[[bytes | bytearray], None]
    receive: Callable[[bytearray], None]


def socket_ends(pair: tuple[socket.socket, socket.socket]) -> tuple[End, End]:
    """The bytes themselves pass through the socket."""

    def end(of: socket.socket) -> End:
        def receive(into: bytearray) -> None:
            view = memoryview(into)
            while view:
                view = view[of.recv_into(view) :]

        return End(of.sendall, receive)

    return end(pair[0]), end(pair[1])


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Connected sockets on the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def memory_ends(wakes: "tuple[Wake, Wake]", *, num_bytes: int) -> tuple[End, End]:
    """The bytes lie in memory that both processes map, one piece for each direction."""
    there, back = mmap.mmap(-1, num_bytes), mmap.mmap(-1, num_bytes)

    def end(out: mmap.mmap, come: mmap.mmap, wake: Wake) -> End:
        def send(data: bytes | bytearray) -> None:
            out[: len(data)] = data
            wake.give()

        def receive(into: bytearray) -> None:
            wake.wait()
            into[:] = memoryview(come)[: len(into)]

        return End(send, receive)

    return end(there, back, wakes[0]), end(back, there, wakes[1])


@dataclass(frozen=True)
class Wake:
    """How one end wakes the other, and waits for it."""

    give: Callable[[], object]
    wait: Callable[[], object]


def message_wakes() -> tuple[Wake, Wake]:
    """Messages of 24 bytes, which can say what lies where."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    message = bytes(24)

    def wake(end: socket.socket) -> Wake:
        return Wake(lambda: end.send(message), lambda: end.recv(64))

    return wake(near), wake(far)


def event_wakes() -> tuple[Wake, Wake]:
    """One event counter for each direction."""
    there, back = os.eventfd(0), os.eventfd(0)
    return (
        Wake(lambda: os.eventfd_write(there, 1), lambda: os.eventfd_read(back)),
        Wake(lambda: os.eventfd_write(back, 1), lambda: os.eventfd_read(there)),
    )


def pipe_wakes() -> tuple[Wake, Wake]:
    """One pipe for each direction."""
    (read_there, write_there), (read_back, write_back) = os.pipe(), os.pipe()
    return (
        Wake(lambda: os.write(write_there, b"1"), lambda: os.read(read_back, 1)),
        Wake(lambda: os.write(write_back, b"1"), lambda: os.read(read_there, 1)),
    )


WAYS: tuple[tuple[str, Callable[[int], tuple[End, End]]], ...] = (
    ("unix socket", lambda _: socket_ends(socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))),
    ("TCP socket", lambda _: socket_ends(tcp_pair())),
    ("shm, unix message", lambda num_bytes: memory_ends(message_wakes(), num_bytes=num_bytes)),
    ("shm, eventfd", lambda num_bytes: memory_ends(event_wakes(), num_bytes=num_bytes)),
    ("shm, pipe", lambda num_bytes: memory_ends(pipe_wakes(), num_bytes=num_bytes)),
)


def echo(end: End, *, num_bytes: int, num_rounds: int) -> None:
    """The other process."""
    into = bytearray(num_bytes)
    for _ in range(num_rounds):
        end.receive(into)
        end.send(into)


def measure(num_bytes: int, *, num_rounds: int) -> dict[str, tuple[float, float]]:
    """Way -> microseconds of a round trip, median and 99th percentile."""
    fork = multiprocessing.get_context("fork")
    ends = {name: make(num_bytes) for name, make in WAYS}
    others = [
        fork.Process(target=echo, args=(far,), kwargs={"num_bytes": num_bytes, "num_rounds": num_rounds})
        for _, far in ends.values()
    ]
    for other in others:
        other.start()
    data, into = os.urandom(num_bytes), bytearray(num_bytes)
    spent_us: dict[str, list[float]] = {name: [] for name in ends}
    for _ in range(num_rounds):
        for name, (near, _) in ends.items():
            began_s = time.perf_counter()
            near.send(data)
            near.receive(into)
            spent_us[name].append((time.perf_counter() - began_s) * 1e6)
    for other in others:
        other.join()
    return {name: _percentiles(values[_WARM_UP:]) for name, values in spent_us.items()}


def _percentiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Round trips of each way and size.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measures every way and size and prints medians and 99th percentiles."""
    found = {size: measure(size, num_rounds=rounds + _WARM_UP) for size in SIZES_BYTES}
    if as_json:
        print(json.dumps({"cpus": os.cpu_count(), "p50_p99_us": found}))
        return
    table = Table("way", *(f"{size:,} B" for size in SIZES_BYTES), title="us there and back: p50 / p99")
    for name, _ in WAYS:
        table.add_row(name, *(f"{p50:.0f} / {p99:.0f}" for p50, p99 in (found[s][name] for s in SIZES_BYTES)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
