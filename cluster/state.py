"""The controller's state and what follows from it: members, routing table, snapshots. Pure: no clock, no I/O.

Level-triggered: an event changes what is known, `snapshot` is computed from what is known now. A restarted
controller that hears the same reports publishes the same table under a higher version.
"""

from dataclasses import dataclass, replace

from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement, table_of
from cluster.topology.types import NodeTopology
from router.experts.table import RoutingTable, table_to_proto
from wire.proto import control_pb2

ROLE_TO_PROTO = {
    "router": control_pb2.ROLE_ROUTER,
    "controller": control_pb2.ROLE_CONTROLLER,
    "expert": control_pb2.ROLE_EXPERT,
    "prefill": control_pb2.ROLE_PREFILL,
    "decode": control_pb2.ROLE_DECODE,
    "both": control_pb2.ROLE_BOTH,
}


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
    num_pages: int = 0
    problem: str = ""
    """Why it is not ready; "" while it simply starts."""


class ClusterState:
    """What the controller knows; one thread uses it."""

    def __init__(
        self,
        members: list[MemberState],
        *,
        model: control_pb2.ModelInfo,
        shape: ExpertShape,
        num_slots: int,
        page_tokens: int,
    ) -> None:
        self._members = {member.worker_id: member for member in members}
        self._model = model
        self._shape = shape
        self._num_slots = num_slots
        self._page_tokens = page_tokens
        self._placement: Placement | None = None
        self._table: RoutingTable | None = None
        self._table_version = 0
        self._snapshot_version = 0

    def member(self, worker_id: str) -> MemberState:
        """What is known of one member."""
        return self._members[worker_id]

    def members(self) -> list[MemberState]:
        """Every member, in the order of the config."""
        return list(self._members.values())

    def on_started(self, member: MemberState) -> None:
        """A process runs and can be reached; it does no work yet."""
        self._members[member.worker_id] = replace(member, is_ready=False)

    def on_ready(self, worker_id: str) -> None:
        """A member can work: an expert worker has loaded its slots."""
        ready = replace(self._members[worker_id], is_ready=True, problem="")
        self._members[worker_id] = ready
        if ready.role == "expert":
            self._renew_table()

    def on_lost(self, worker_id: str, *, problem: str) -> None:
        """A process is gone or does not answer."""
        lost = self._members[worker_id]
        self._members[worker_id] = replace(
            lost, address="", metrics_address="", is_ready=False, problem=problem
        )
        if lost.role == "expert":
            self._renew_table()

    def on_version_seen(self, table_version: int) -> None:
        """A worker holds slots of a table of an earlier controller: the next version is above it."""
        self._table_version = max(self._table_version, table_version)

    def placement(self) -> Placement | None:
        """Who holds which experts; decided once every expert worker has a node, None before."""
        experts = [member for member in self._members.values() if member.role == "expert"]
        if self._placement is None and all(member.node is not None for member in experts):
            hosts = [
                ExpertHost(worker_id=m.worker_id, failure_domain=m.node.failure_domain if m.node else ())
                for m in experts
            ]
            self._placement = plan_placement(self._shape, hosts, num_slots=self._num_slots)
        return self._placement

    @property
    def next_table_version(self) -> int:
        """The version that slots are prepared for now."""
        return self._table_version + 1

    @property
    def table_version(self) -> int:
        """Version of the table in force; 0 = none yet."""
        return self._table.version if self._table else 0

    def waiting_for(self) -> str:
        """What stands between now and a whole cluster; "" when nothing does."""
        missing = [member for member in self._members.values() if not member.is_ready]
        if not missing:
            return ""
        named = ", ".join(f"{m.worker_id} ({m.problem})" if m.problem else m.worker_id for m in missing[:4])
        return f"{len(missing)} of {len(self._members)} members: {named}{', ...' if len(missing) > 4 else ''}"

    def snapshot(self) -> control_pb2.ClusterSnapshot:
        """The next snapshot; its version is one above the last."""
        self._snapshot_version += 1
        message = control_pb2.ClusterSnapshot(
            version=self._snapshot_version,
            model=self._model,
            members=[_member_to_proto(member) for member in self._members.values()],
            waiting_for=self.waiting_for(),
            page_tokens=self._page_tokens,
        )
        if self._table is not None:
            message.table.CopyFrom(table_to_proto(self._table))
        return message

    def _renew_table(self) -> None:
        """A table over the workers that are ready; the old one stays while an expert would have no home."""
        live = [m.worker_id for m in self._members.values() if m.role == "expert" and m.is_ready]
        if self._placement is None:
            return
        table = table_of(self._placement, self._shape, version=self.next_table_version, live=live)
        if table is not None:
            self._table = table
            self._table_version = table.version


def _member_to_proto(member: MemberState) -> control_pb2.Member:
    message = control_pb2.Member(
        worker_id=member.worker_id,
        role=ROLE_TO_PROTO[member.role],
        address=member.address,
        metrics_address=member.metrics_address,
        incarnation=member.incarnation,
        is_ready=member.is_ready,
        num_pages=member.num_pages,
    )
    if member.node is not None:
        message.node.node_id = member.node.node_id
        message.node.host = member.node.host
        message.node.zone = member.node.zone
        message.node.rack = member.node.rack
        message.node.accelerator = member.node.accelerator
    return message
