"""Who comes and who goes when a role gets another size, and what can never be."""

import pytest

from cluster.control.members import (
    ROLE_TO_PROTO,
    MemberState,
    check_role_change,
    count_roles,
    member_to_proto,
    plan_resize,
    role_of,
)
from wire.errors import ConfigError, InvalidRequest, MorayError


def members(*worker_ids: str, leaving: str = "") -> list[MemberState]:
    return [
        MemberState(worker_id=name, role=role_of(name), is_ready=True, is_leaving=name == leaving)
        for name in worker_ids
    ]


def test_worked_example() -> None:
    two = members("expert-0", "expert-1")
    grown = plan_resize(two, "expert", 3)
    assert (grown.new, grown.leaving, grown.staying) == (("expert-2",), (), ("expert-0", "expert-1"))
    shrunk = plan_resize(two, "expert", 1)
    assert (shrunk.new, shrunk.leaving, shrunk.staying) == ((), ("expert-1",), ("expert-0",))


def test_member_that_was_to_go_may_stay() -> None:
    plan = plan_resize(members("expert-0", "expert-1", leaving="expert-1"), "expert", 2)
    assert (plan.new, plan.leaving, plan.staying) == ((), (), ("expert-0", "expert-1"))


@pytest.mark.parametrize(
    ("present", "role", "is_possible"),
    [
        (("expert-0", "both-0"), "expert", False),
        (("prefill-0", "decode-0"), "decode", False),
        (("prefill-0", "decode-0"), "prefill", False),
        (("prefill-0", "both-0"), "prefill", True),
        (("prefill-0", "decode-0", "both-0"), "both", True),
        (("prefill-0", "both-0"), "both", False),
    ],
)
def test_none_of_a_role_only_when_others_do_its_work(
    present: tuple[str, ...], role: str, is_possible: bool
) -> None:
    if is_possible:
        assert plan_resize(members(*present), role, 0).leaving == (f"{role}-0",)
    else:
        with pytest.raises(ConfigError, match=rf"{role}\.replicas"):
            plan_resize(members(*present), role, 0)


def in_role(worker_id: str, role: str) -> MemberState:
    return MemberState(worker_id=worker_id, role=role_of(worker_id), assigned_role=role, is_ready=True)


def test_worker_is_shown_in_the_role_that_it_was_given() -> None:
    assert member_to_proto(in_role("decode-1", "prefill")).role == ROLE_TO_PROTO["prefill"]


@pytest.mark.parametrize(
    ("worker_id", "role", "error"),
    [
        ("decode-1", "prefill", None),
        ("decode-0", "both", None),
        ("prefill-0", "both", None),
        ("prefill-0", "decode", ConfigError),
        ("expert-0", "decode", InvalidRequest),
        ("decode-7", "both", InvalidRequest),
        ("decode-0", "router", InvalidRequest),
    ],
)
def test_role_changes_while_somebody_does_the_rest(
    worker_id: str, role: str, error: type[MorayError] | None
) -> None:
    present = members("expert-0", "prefill-0", "decode-0", "decode-1")
    if error is None:
        check_role_change(present, worker_id, role)
    else:
        with pytest.raises(error):
            check_role_change(present, worker_id, role)


def test_worker_in_another_role_counts_there_when_a_role_shrinks() -> None:
    present = [*members("prefill-0", "decode-1"), in_role("decode-0", "prefill")]
    with pytest.raises(ConfigError, match=r"decode\.replicas"):
        plan_resize(present, "decode", 1)
    assert plan_resize(present, "prefill", 0).leaving == ("prefill-0",)


def test_none_of_a_role_that_has_none_changes_nothing() -> None:
    plan = plan_resize(members("expert-0", "decode-0"), "both", 0)
    assert (plan.new, plan.leaving, plan.staying) == ((), (), ())


def test_who_leaves_is_not_counted() -> None:
    counts = count_roles(members("expert-0", "expert-1", "decode-0", "router-0", leaving="expert-1"))
    assert counts == {"expert": 1, "prefill": 0, "decode": 1, "both": 0}


@pytest.mark.parametrize(("role", "is_ready"), [("expert", True), ("decode", False)])
def test_attention_worker_that_leaves_takes_nothing_new(role: str, is_ready: bool) -> None:
    (member,) = members(f"{role}-0", leaving=f"{role}-0")
    message = member_to_proto(member)
    assert (message.is_ready, message.is_leaving, message.role) == (is_ready, True, ROLE_TO_PROTO[role])
