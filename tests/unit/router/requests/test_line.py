"""Who is let in, who waits, who is refused; the accounts stay right whatever happens."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.requests.line import Line, LineLimits, Ticket
from wire.errors import DeadlinePassed, InternalError, Overloaded

LIMITS = LineLimits(max_requests=8, max_wait_s=30.0, tenant_share=0.5)
PAGES = 10


class Desk:
    """A line with its clock and its capacity."""

    def __init__(self, limits=LIMITS):
        self.line = Line(limits)
        self.now_s = 0.0
        self.num_tickets = 0

    def ticket(self, num_pages=PAGES, tenant="", priority=0, end_s=None):
        self.num_tickets += 1
        return Ticket(
            ticket_id=self.num_tickets, tenant=tenant, priority=priority, num_pages=num_pages, end_s=end_s
        )

    def enter(self, num_pages=PAGES, *, capacity=PAGES, **fields):
        ticket = self.ticket(num_pages, **fields)
        return ticket, self.line.enter(ticket, capacity_pages=capacity, now_s=self.now_s)

    def wait(self, **fields):
        ticket, entry = self.enter(**fields)
        assert entry.is_waiting
        return ticket

    def refusal(self, **fields):
        refused = self.enter(**fields)[1].refused
        assert refused
        return refused

    def admit(self, capacity=PAGES):
        return self.line.admit(capacity_pages=capacity, now_s=self.now_s)


def full_desk(**limits):
    """A desk whose capacity is taken."""
    desk = Desk(LineLimits(**{**LIMITS.__dict__, **limits}))
    desk.first, entry = desk.enter()
    assert not entry.is_waiting
    return desk


def test_what_fits_is_admitted_and_the_rest_waits_its_turn():
    desk = full_desk()
    second, third = desk.wait(), desk.wait()
    assert desk.admit() == []
    desk.line.leave(desk.first)
    assert desk.admit() == [second]
    desk.line.leave(second)
    assert desk.admit() == [third]


def test_request_larger_than_everything_goes_alone():
    desk = full_desk()
    large = desk.wait(num_pages=99)
    desk.line.leave(desk.first)
    assert desk.admit() == [large]


def test_first_in_line_is_not_passed_over_for_a_smaller_one():
    desk = full_desk()
    large, _small = desk.wait(num_pages=10), desk.wait(num_pages=1)
    assert desk.admit(capacity=15) == []
    assert desk.admit(capacity=20) == [large]


def test_priority_goes_first_then_the_tenant_that_holds_less():
    desk = full_desk(tenant_share=1)
    desk.wait(tenant="a")
    held = desk.wait(tenant="b")
    urgent = desk.wait(tenant="a", priority=1)
    assert desk.admit(capacity=20) == [urgent]
    other = desk.wait(tenant="c")
    assert desk.admit(capacity=40) == [held, other]


@pytest.mark.parametrize("max_requests", [0, 3])
def test_full_line_refuses_with_a_delay(max_requests):
    desk = full_desk(max_requests=max_requests)
    for _ in range(max_requests):
        desk.wait()
    refused = desk.refusal()
    assert refused.reason == "full"
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s == 1.0


def moving_desk():
    """A desk whose line moves 10 pages in 4 s, and did so four times; three wait."""
    desk = full_desk()
    holder, *waiting = desk.first, *(desk.wait() for _ in range(7))
    for next_one in waiting[:4]:
        desk.now_s += 4.0
        desk.line.leave(holder)
        assert desk.admit() == [next_one]
        holder = next_one
    return desk


def test_wait_is_known_from_how_the_line_moved():
    desk = moving_desk()
    desk.wait(end_s=32.1)
    refused = desk.refusal(end_s=35.9)
    assert (refused.reason, type(refused.error)) == ("deadline", DeadlinePassed)
    assert "about 20.0 s" in refused.error.message


def test_slow_first_ones_tell_nothing_yet():
    desk = full_desk()
    holder, *waiting = desk.first, *(desk.wait() for _ in range(5))
    for next_one in waiting[:3]:
        desk.now_s += 1000.0
        desk.line.leave(holder)
        assert desk.admit() == [next_one]
        holder = next_one
        desk.wait()


def test_too_long_a_wait_is_refused_and_higher_priority_waits_less():
    desk = moving_desk()
    refused = desk.refusal(num_pages=50)
    assert refused.reason == "wait"
    assert refused.error.retry_after_s == 30.0
    desk.wait(num_pages=50, priority=1)


def test_pace_is_forgotten_when_nobody_waits():
    desk = full_desk()
    second = desk.wait()
    desk.now_s = 1000.0
    desk.line.leave(desk.first)
    assert desk.admit() == [second]
    desk.wait(num_pages=50)


def test_tenant_keeps_to_its_share_while_others_wait():
    desk = full_desk()
    for _ in range(4):
        desk.wait(tenant="a")
    desk.wait(tenant="b")
    assert desk.refusal(tenant="a").reason == "tenant"
    desk.wait(tenant="b")


def test_tenant_that_came_alone_gives_its_newest_place_to_another():
    desk = full_desk()
    places = [desk.wait(tenant="a") for _ in range(8)]
    assert desk.refusal(tenant="a").reason == "full"
    _, entry = desk.enter(tenant="b")
    assert entry.is_waiting
    victim, refused = entry.displaced
    assert (victim, refused.reason) == (places[-1], "displaced")
    assert isinstance(refused.error, Overloaded)


def test_who_waited_too_long_is_told_why():
    desk = full_desk()
    patient, hurried = desk.wait(), desk.wait(end_s=5.0)
    assert isinstance(desk.line.expire(patient, now_s=30.0).error, Overloaded)
    assert isinstance(desk.line.expire(hurried, now_s=5.0).error, DeadlinePassed)


def test_leaving_twice_is_an_error():
    desk = full_desk()
    desk.line.leave(desk.first)
    with pytest.raises(InternalError, match="twice"):
        desk.line.leave(desk.first)


class LineMachine(RuleBasedStateMachine):
    """Requests come, are let in, give up and end in any order."""

    def __init__(self):
        super().__init__()
        self.desk = Desk()
        self.held, self.waiting = [], []

    @rule(
        num_pages=st.integers(0, 12),
        tenant=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        left_s=st.none() | st.floats(0, 9),
    )
    def come(self, num_pages, tenant, priority, left_s):
        end_s = None if left_s is None else self.desk.now_s + left_s
        ticket, entry = self.desk.enter(num_pages, capacity=20, tenant=tenant, priority=priority, end_s=end_s)
        if entry.displaced:
            self.waiting.remove(entry.displaced[0])
        if entry.refused:
            assert entry.displaced is None
            return
        (self.waiting if entry.is_waiting else self.held).append(ticket)

    @rule(capacity=st.sampled_from([0, 20, math.inf]), wait_s=st.floats(0, 3))
    def let_in(self, capacity, wait_s):
        self.desk.now_s += wait_s
        for ticket in self.desk.admit(capacity):
            self.waiting.remove(ticket)
            self.held.append(ticket)
        if capacity == math.inf:
            assert not self.waiting

    @rule(data=st.data())
    def go(self, data):
        if everyone := self.held + self.waiting:
            ticket = data.draw(st.sampled_from(everyone))
            (self.held if ticket in self.held else self.waiting).remove(ticket)
            self.desk.line.leave(ticket)

    @invariant()
    def accounts_are_right(self):
        self.desk.line.check_integrity()
        assert self.desk.line.num_held_pages == sum(ticket.num_pages for ticket in self.held)
        assert self.desk.line.num_waiting == len(self.waiting)


TestLineMachine = LineMachine.TestCase
