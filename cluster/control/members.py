"""The members of a cluster as the controller knows them, and who comes or goes when a role is resized."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.topology.types import NodeTopology
from wire.errors import ConfigError, InvalidRequest
from wire.proto import control_pb2

ROLE_TO_PROTO = {
    "router": control_pb2.ROLE_ROUTER,
    "controller": control_pb2.ROLE_CONTROLLER,
    "expert": control_pb2.ROLE_EXPERT,
    "prefill": control_pb2.ROLE_PREFILL,
    "decode": control_pb2.ROLE_DECODE,
    "both": control_pb2.ROLE_BOTH,
}
ATTENTION_ROLES = ("prefill", "decode", "both")
"""Those that use the routing table."""
ELASTIC_ROLES = ("expert", *ATTENTION_ROLES)
"""Those whose number can change while the cluster runs."""


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """One process of the cluster as the controller knows it."""

    worker_id: str
    role: str
    address: str = ""
    metrics_address: str = ""
    node: NodeTopology | None = None
    incarnation: int = 0
    """Unix second in which its process started; 0 = not started yet."""
    is_ready: bool = False
    is_leaving: bool = False
    """It is to go when nothing needs it any more."""
    num_pages: int = 0
    problem: str = ""
    """Why it is not ready; "" while it simply starts."""
    assigned_role: str = ""
    """What an attention worker does instead of its group's role; "" = that role."""
    trouble: str = ""
    """Why it takes no requests although it runs, in its own words; "" = it does."""

    @property
    def duty(self) -> str:
        """The role that it works in."""
        return self.assigned_role or self.role

    @property
    def can_work(self) -> bool:
        """Whether it is up and takes work."""
        return self.is_ready and not self.trouble


@dataclass(frozen=True, kw_only=True)
class Resize:
    """What a role's new size asks for, by worker id."""

    new: tuple[str, ...]
    """Members that do not exist yet."""
    leaving: tuple[str, ...]
    """Members that are to go."""
    staying: tuple[str, ...]
    """Members that stay, those among them that were to go."""


def plan_resize(members: Sequence[MemberState], role: str, num_workers: int) -> Resize:
    """The members of a role are numbered from 0; the highest numbers go first.

    Worked example: of expert-0 and expert-1, three are wanted: expert-2 is new. One is wanted: expert-1
    leaves.

    Raises:
        ConfigError: without another worker of the role nothing would be served.
    """
    wanted = [f"{role}-{idx}" for idx in range(num_workers)]
    present = [member.worker_id for member in members if member.role == role]
    staying = {m.duty for m in members if (m.worker_id in wanted if m.role == role else not m.is_leaving)}
    after = staying | {role_of(worker_id) for worker_id in wanted if worker_id not in present}
    could_serve = _can_serve(role, {m.duty for m in members if not m.is_leaving})
    if present and not _can_serve(role, after) and (could_serve or not num_workers):
        least = "at least 1" if not num_workers else "more"
        raise ConfigError(
            field=f"{role}.replicas", wanted=f"{least} while the cluster serves", given=str(num_workers)
        )
    return Resize(
        new=tuple(worker_id for worker_id in wanted if worker_id not in present),
        leaving=tuple(worker_id for worker_id in present if worker_id not in wanted),
        staying=tuple(worker_id for worker_id in present if worker_id in wanted),
    )


def check_role_change(members: Sequence[MemberState], worker_id: str, role: str) -> None:
    """Refuses a change of an attention worker's role after which nobody would prefill, or nobody decode.

    Raises:
        InvalidRequest: no such attention worker, or no such role for one; names the field.
        ConfigError: the others do not do what the worker does now.
    """
    workers = {m.worker_id: m for m in members if m.role in ATTENTION_ROLES and not m.is_leaving}
    if worker_id not in workers:
        known = ", ".join(workers)
        raise InvalidRequest(
            f"worker_id: wanted an attention worker ({known}); got {worker_id!r}", field="worker_id"
        )
    if role not in ATTENTION_ROLES:
        raise InvalidRequest(f"role: wanted one of {', '.join(ATTENTION_ROLES)}; got {role}", field="role")
    duties = {role if m.worker_id == worker_id else m.duty for m in workers.values()}
    if not _can_serve(role, duties):
        wanted = f"another worker that does what {worker_id} does now ({workers[worker_id].duty})"
        raise ConfigError(field="role", wanted=wanted, given="none", hint="add one with `moray scale`")


def role_of(worker_id: str) -> str:
    """`expert` for expert-12."""
    return worker_id.rsplit("-", 1)[0]


def count_roles(members: Iterable[MemberState]) -> dict[str, int]:
    """Elastic role -> members that are to stay."""
    counts = dict.fromkeys(ELASTIC_ROLES, 0)
    for member in members:
        if member.role in counts and not member.is_leaving:
            counts[member.role] += 1
    return counts


def member_to_proto(member: MemberState) -> control_pb2.Member:
    """A member as the snapshot shows it; an attention worker that leaves takes nothing new."""
    message = control_pb2.Member(
        worker_id=member.worker_id,
        role=ROLE_TO_PROTO[member.duty],
        address=member.address,
        metrics_address=member.metrics_address,
        incarnation=member.incarnation,
        is_ready=member.can_work and not (member.is_leaving and member.role in ATTENTION_ROLES),
        num_pages=member.num_pages,
        is_leaving=member.is_leaving,
    )
    if member.node is not None:
        message.node.node_id = member.node.node_id
        message.node.host = member.node.host
        message.node.zone = member.node.zone
        message.node.rack = member.node.rack
        message.node.accelerator = member.node.accelerator
    return message


def _can_serve(role: str, duties: set[str]) -> bool:
    """Whether experts, or prefill and decode, are there when a role has changed."""
    if role == "expert":
        return "expert" in duties
    return "both" in duties or {"prefill", "decode"} <= duties
