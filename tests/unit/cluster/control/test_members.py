"""Who comes and who goes when a role gets another size, and what can never be."""

import pytest

from cluster.control.members import (
    ROLE_TO_PROTO,
    MemberState,
    count_roles,
    member_to_proto,
    plan_resize,
    role_of,
)
from wire.errors import ConfigError


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
