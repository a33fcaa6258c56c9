"""The gate: refuses at once what would wait too long, and learns how long that is from the queue."""

import threading

import pytest

from wire.errors import Overloaded
from workers.attention.gate import Gate, QueueLimits


def make_gate(max_requests: int = 100, max_wait_s: float = 10.0) -> Gate:
    return Gate(QueueLimits(max_requests=max_requests, max_wait_s=max_wait_s, lookahead_tokens=1))


def entered(gate: Gate, num_requests: int, num_tokens: int = 10, *, now_s: float = 0.0) -> None:
    for _ in range(num_requests):
        assert gate.enter(num_tokens, now_s=now_s) is None


def test_full_queue_refuses_until_one_has_left() -> None:
    gate = make_gate(max_requests=2)
    entered(gate, 2)
    refusal = gate.enter(10, now_s=0.0)
    assert isinstance(refusal, Overloaded)
    assert "2 requests wait here" in refusal.message
    assert refusal.retry_after_s == 1.0
    gate.leave(10, now_s=1.0, is_served=False)
    assert gate.enter(10, now_s=1.0) is None


@pytest.mark.parametrize(("num_waiting", "is_refused"), [(19, False), (21, True)])
def test_wait_is_told_from_how_the_queue_moved(num_waiting: int, is_refused: bool) -> None:
    """Four times ten tokens left in 0.5 s each: 190 tokens last 9.5 s, 210 longer than the limit."""
    gate = make_gate()
    entered(gate, num_waiting + 4)
    for i in range(4):
        gate.leave(10, now_s=0.5 * (i + 1), is_served=True)
    refusal = gate.enter(10, now_s=2.0)
    assert (refusal is not None) == is_refused
    if refusal:
        assert refusal.retry_after_s == 10.0
        assert "about 10.5 s" in refusal.message


def test_a_slow_first_one_tells_nothing_yet() -> None:
    gate = make_gate()
    entered(gate, 30)
    for i in range(3):
        gate.leave(1, now_s=50.0 * i, is_served=True)
        assert gate.enter(10, now_s=50.0 * i) is None


def test_who_gives_up_tells_nothing_of_the_pace() -> None:
    gate = make_gate()
    entered(gate, 30)
    gate.leave(10, now_s=100.0, is_served=False)
    assert gate.enter(10, now_s=100.0) is None


def test_pace_of_a_queue_that_is_over_is_forgotten() -> None:
    """The first one took 100 s; the queue was empty afterwards."""
    gate = make_gate()
    entered(gate, 1)
    gate.leave(10, now_s=100.0, is_served=True)
    entered(gate, 50, now_s=200.0)


def test_pace_follows_the_last_few_dozen() -> None:
    gate = make_gate(max_requests=1000)
    entered(gate, 200)
    for i in range(100):
        gate.leave(10, now_s=i * 10.0, is_served=True)
    assert gate.enter(10, now_s=990.0) is not None
    for i in range(90):
        gate.leave(10, now_s=990.0 + i * 0.001, is_served=True)
    assert gate.enter(10, now_s=991.0) is None


def test_counts_hold_with_many_threads() -> None:
    gate = make_gate(max_requests=50)
    refused = []

    def visit() -> None:
        for _ in range(200):
            if gate.enter(3, now_s=0.0) is None:
                gate.leave(3, now_s=0.0, is_served=False)
            else:
                refused.append(1)

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.is_empty()
    assert not refused
