"""Heartbeats: only misses in a row lose a worker."""

from cluster.control.heartbeat import Pulse


def test_worked_example() -> None:
    pulse = Pulse(max_misses=3)
    seen = []
    for answered in (True, False, False, True, False, False, False):
        pulse = pulse.after(answered=answered)
        seen.append(pulse.is_lost)
    assert seen == [False] * 6 + [True]
