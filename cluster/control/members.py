"""The members of a cluster as the controller knows them, and who comes or goes when a role is resized."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.topology.types import NodeTopology
from wire.errors import ConfigError
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
    trouble: str = ""
    """Why it takes no requests although it runs, in its own words; "" = it does."""

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
    others = {m.role for m in members if m.role != role and not m.is_leaving}
    if present and not num_workers and not _can_do_without(role, others):
        raise ConfigError(field=f"{role}.replicas", wanted="at least 1 while the cluster serves", given="0")
    return Resize(
        new=tuple(worker_id for worker_id in wanted if worker_id not in present),
        leaving=tuple(worker_id for worker_id in present if worker_id not in wanted),
        staying=tuple(worker_id for worker_id in present if worker_id in wanted),
    )


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
        role=ROLE_TO_PROTO[member.role],
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


def _can_do_without(role: str, others: set[str]) -> bool:
    """Whether experts, prefill and decode are all there without a role."""
    if role == "both":
        return {"prefill", "decode"} <= others
    return role != "expert" and "both" in others
