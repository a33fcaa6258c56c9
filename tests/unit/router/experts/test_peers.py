"""The book of peers: who is trusted when, who is slow, and how long a call may take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experts.peers import PeerBook, PeerRules


def book(**seconds_per_row: float) -> PeerBook:
    """Workers that answered once."""
    made = PeerBook()
    for worker_id, seconds in seconds_per_row.items():
        made.on_answer(worker_id, num_rows=10, seconds=10 * seconds, queue_rows=0)
    return made


def is_trusted(of: PeerBook, worker_id: str = "a") -> bool:
    return of.trusted([worker_id])[0]


def quarantine_s(of: PeerBook, *, from_s: float) -> float:
    """How long after `from_s` the next probe of a is due, to 1 ms."""
    return next(ms / 1000 for ms in range(100_000) if of.due_probes(now_s=from_s + ms / 1000) == ["a"])


def test_docstring_example() -> None:
    of = book(a=0.002, b=0.001, c=0.001)
    assert of.straggler_scores(["a"])[0] == pytest.approx(2)
    assert of.row_costs(["a", "b", "c"]) == pytest.approx([2, 1, 1])
    of.on_failure("a", now_s=10.0)
    assert not is_trusted(of)
    assert (of.due_probes(now_s=10.4999), of.due_probes(now_s=10.5)) == ([], ["a"])
    of.on_probe_sent("a")
    of.on_failure("a", now_s=11.5)
    assert (of.due_probes(now_s=12.4999), of.due_probes(now_s=12.5)) == ([], ["a"])


def test_unknown_worker_is_trusted_and_as_others() -> None:
    of = book(b=0.001)
    assert of.trusted(["x", "b"]) == [True, True]
    assert (of.seconds_per_row("x"), of.queue_rows("x"), of.straggler_scores(["x"])[0]) == (0, 0, 1)
    assert of.row_costs(["x"]) == [1]
    assert of.attempt_s("x", num_rows=10**6) == PeerRules().attempt_s


def test_quarantine_doubles_up_to_the_longest() -> None:
    of = PeerBook(PeerRules(quarantine_s=0.5, longest_quarantine_s=3.0))
    waits = []
    now_s = 0.0
    for _ in range(6):
        of.on_failure("a", now_s=now_s)
        waits.append(quarantine_s(of, from_s=now_s))
        now_s += waits[-1]
        of.on_probe_sent("a")
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_thousand_failures_still_make_the_longest_quarantine() -> None:
    of = PeerBook()
    for number in range(1000):
        of.on_failure("a", now_s=100.0 * number)
        of.on_probe_sent("a")
    assert of.due_probes(now_s=1e9) == []
    of.on_failure("a", now_s=1e9)
    assert quarantine_s(of, from_s=1e9) == 30.0


def test_calls_that_were_under_way_when_the_first_failed_count_once() -> None:
    of = PeerBook()
    for now_s in (10.0, 10.1, 10.2, 10.49):
        of.on_failure("a", now_s=now_s)
    assert of.due_probes(now_s=10.5) == ["a"]
    of.on_probe_sent("a")
    of.on_failure("a", now_s=11.0)
    assert quarantine_s(of, from_s=11.0) == 1.0


def test_probe_is_sent_once_until_it_fails() -> None:
    of = PeerBook()
    of.on_failure("a", now_s=10.0)
    of.on_probe_sent("a")
    assert of.due_probes(now_s=99.0) == []
    of.on_failure("a", now_s=99.0)
    assert of.due_probes(now_s=101.0) == ["a"]


def test_probe_that_is_answered_lets_in_and_empties_the_queue() -> None:
    of = PeerBook()
    of.on_answer("a", num_rows=1, seconds=0.01, queue_rows=50)
    of.on_failure("a", now_s=10.0)
    assert of.num_quarantined() == 1
    of.on_probe_sent("a")
    of.on_probe_answered("a")
    assert is_trusted(of)
    assert (of.num_quarantined(), of.queue_rows("a"), of.due_probes(now_s=1e9)) == (0, 0, [])


@pytest.mark.parametrize(("answers", "expected_s"), [(0, 1.0), (1, 0.5)])
def test_only_an_answer_with_rows_forgives_earlier_failures(answers: int, expected_s: float) -> None:
    of = PeerBook()
    of.on_failure("a", now_s=10.0)
    of.on_probe_sent("a")
    of.on_probe_answered("a")
    for _ in range(answers):
        of.on_answer("a", num_rows=1, seconds=0.01, queue_rows=0)
    of.on_failure("a", now_s=20.0)
    assert quarantine_s(of, from_s=20.0) == expected_s


def test_late_answer_of_a_quarantined_worker_does_not_let_it_in() -> None:
    of = PeerBook()
    of.on_failure("a", now_s=10.0)
    of.on_answer("a", num_rows=1, seconds=5.0, queue_rows=0)
    assert not is_trusted(of)
    of.on_probe_sent("a")
    of.on_failure("a", now_s=12.0)
    assert quarantine_s(of, from_s=12.0) == 1.0


def test_failure_of_one_worker_is_no_one_elses() -> None:
    of = book(a=0.001, b=0.001)
    of.on_failure("a", now_s=10.0)
    assert of.trusted(["b", "a", "b"]) == [True, False, True]
    assert of.due_probes(now_s=11.0) == ["a"]


@pytest.mark.parametrize(("num_rows", "expected_s"), [(1, 1.0), (12, 1.0), (13, 1.04), (100, 8.0), (0, 1.0)])
def test_call_is_late_after_eight_times_what_such_calls_took(num_rows: int, expected_s: float) -> None:
    """10 ms a row, and never less than 1 s."""
    assert book(a=0.01).attempt_s("a", num_rows=num_rows) == pytest.approx(expected_s)


def test_speed_is_a_moving_average_of_calls() -> None:
    of = PeerBook()
    of.on_answer("a", num_rows=10, seconds=0.1, queue_rows=4)
    assert of.seconds_per_row("a") == pytest.approx(0.01)
    of.on_answer("a", num_rows=10, seconds=0.2, queue_rows=2)
    assert of.seconds_per_row("a") == pytest.approx(0.012)
    assert of.queue_rows("a") == 2
    assert of.backlog_rows(["b", "a"]) == [0, 2]


@pytest.mark.parametrize(
    ("speeds", "score", "cost"),
    [
        ({"a": 0.005}, 1, 1),
        ({"a": 0.005, "b": 0.001}, 5, 5),
        ({"a": 0.001, "b": 0.005}, 1, 1),
        ({"a": 0.0015, "b": 0.001}, 1.5, 1),
        ({"a": 0.0016, "b": 0.001}, 1.6, 1.6),
        ({"a": 0.004, "b": 0.001, "c": 0.002}, 2, 2),
        ({"a": 0.0005, "b": 0.001, "c": 0.002}, 0.5, 1),
        ({"a": 0.009, "b": 0.003, "c": 0.003, "d": 0.003, "e": 0.008}, 3, 3),
    ],
)
def test_straggler_takes_longer_than_the_median(speeds: dict[str, float], score: float, cost: float) -> None:
    of = book(**speeds)
    of.trusted(["never asked"])
    assert of.straggler_scores(["a"])[0] == pytest.approx(score)
    assert of.row_costs(["a"]) == pytest.approx([cost])


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9))
def test_at_most_half_of_the_workers_are_stragglers(speeds: list[float]) -> None:
    of = book(**{f"w{i}": seconds for i, seconds in enumerate(speeds)})
    costs_W = of.row_costs([f"w{i}" for i in range(len(speeds))])
    assert min(costs_W) == 1
    assert sum(cost > 1 for cost in costs_W) <= len(speeds) // 2


def test_workers_that_left_are_forgotten() -> None:
    of = book(a=0.004, b=0.001, c=0.001)
    of.on_failure("a", now_s=10.0)
    of.keep(["b", "d"])
    assert (of.num_quarantined(), of.due_probes(now_s=99.0)) == (0, [])
    assert of.seconds_per_row("b") == pytest.approx(0.001)
    assert (of.seconds_per_row("a"), is_trusted(of)) == (0, True)
