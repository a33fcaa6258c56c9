"""Heartbeats: only misses in a row lose a worker."""

from cluster.control.heartbeat import Pulse


def test_worked_example() -> None:
    pulse = Pulse(max_misses=3)
    seen = []
    for answered in (True, False, False, True, False, False, False):
        pulse = pulse.after(answered=answered)
        seen.append(pulse.is_lost)
    assert seen == [False] * 6 + [True]


def test_miss_of_a_controller_that_was_late_itself_counts_for_nothing() -> None:
    pulse = Pulse(max_misses=2).after(answered=False)
    assert not pulse.after(answered=False, was_late=True).is_lost
    assert pulse.after(answered=False).is_lost
    assert pulse.after(answered=True, was_late=True).num_missed == 0
