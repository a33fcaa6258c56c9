"""The pace of a queue."""

import pytest

from wire.pace import QueuePace


def make_pace(num_served: int, *, each_s: float = 0.5, amount: float = 10.0) -> QueuePace:
    """Of a queue that began at 100 s and let one of this size go every `each_s`."""
    pace = QueuePace()
    pace.begin(now_s=100.0)
    for i in range(num_served):
        pace.observe(amount, now_s=100.0 + each_s * (i + 1))
    return pace


@pytest.mark.parametrize(("num_served", "wait_s"), [(0, 0.0), (3, 0.0), (4, 9.5), (40, 9.5)])
def test_wait_is_told_from_the_fourth_on(num_served: int, wait_s: float) -> None:
    assert make_pace(num_served).wait_s(190.0) == pytest.approx(wait_s)


def test_pace_follows_the_last_few_dozen() -> None:
    pace = make_pace(100, each_s=10.0)
    slow_s = pace.wait_s(10.0)
    for i in range(90):
        pace.observe(10.0, now_s=1100.0 + i * 0.001)
    assert pace.wait_s(10.0) < slow_s / 50


def test_pace_of_a_queue_that_is_over_is_forgotten() -> None:
    pace = make_pace(10, each_s=50.0)
    pace.forget()
    pace.begin(now_s=900.0)
    assert pace.wait_s(1e6) == 0.0
    for i in range(4):
        pace.observe(10.0, now_s=900.5 + 0.5 * i)
    assert pace.wait_s(190.0) == pytest.approx(9.5)


def test_what_takes_no_pages_says_nothing() -> None:
    assert make_pace(10, amount=0.0).wait_s(5.0) == 0.0
