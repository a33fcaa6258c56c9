"""The controller's state and what follows from it: members, placement, snapshots. Pure: no clock, no I/O.

Level-triggered: an event changes what is known, `snapshot` is computed from what is known now. A restarted
controller that hears the same reports publishes the same table under a higher version.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.control.recovery import recover_placement
from cluster.control.tables import TableLife
from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement
from cluster.topology.types import NodeTopology
from router.experts.table import table_to_proto
from wire.proto import control_pb2
from workers.expert.types import Slot

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
        self.tables = TableLife(shape)
        """Who holds which experts, and the routing tables."""
        self._table_message: control_pb2.RoutingTable | None = None
        """The newest table as it travels: made once for every version."""
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
        if member.role in ATTENTION_ROLES:
            self.tables.on_reader_started(member.worker_id)

    def on_described(self, worker_id: str, slots: Iterable[Slot], *, table_version: int) -> None:
        """An expert worker says what it holds, and for which table it loaded that."""
        self.tables.on_worker(worker_id, slots, table_version=table_version)
        self._place()

    def on_ready(self, worker_id: str) -> None:
        """A member can work: an expert worker holds what it should."""
        self._members[worker_id] = replace(self._members[worker_id], is_ready=True, problem="")

    def on_lost(self, worker_id: str, *, problem: str) -> None:
        """A process is gone or does not answer."""
        lost = self._members[worker_id]
        self._members[worker_id] = replace(
            lost, address="", metrics_address="", is_ready=False, problem=problem
        )
        if lost.role == "expert":
            self.tables.on_worker_lost(worker_id)
        elif lost.role in ATTENTION_ROLES:
            self.tables.on_reader_lost(worker_id)

    def on_report(self, member_id: str, table_version: int) -> None:
        """An attention worker says which table it uses; nothing is believed of one that does not run."""
        member = self._members.get(member_id)
        if member is not None and member.role in ATTENTION_ROLES and member.address:
            self.tables.on_reader(member_id, table_version)

    def is_prepared(self, worker_id: str) -> bool:
        """Whether an expert worker holds all that a placement gives it."""
        return self.tables.placement is not None and self.tables.is_prepared(worker_id)

    @property
    def table_version(self) -> int:
        """Version of the newest table; 0 = none yet."""
        return self.tables.table.version if self.tables.table else 0

    def waiting_for(self) -> str:
        """What stands between now and a whole cluster; "" when nothing does."""
        missing = [member for member in self._members.values() if not member.is_ready]
        if not missing:
            return ""
        named = ", ".join(f"{m.worker_id} ({m.problem})" if m.problem else m.worker_id for m in missing[:4])
        return f"{len(missing)} of {len(self._members)} members: {named}{', ...' if len(missing) > 4 else ''}"

    def snapshot(self, *, table_unix_s: float = 0.0) -> control_pb2.ClusterSnapshot:
        """The next snapshot; its version is one above the last.

        Args:
            table_unix_s: when the newest table was published, in Unix time; 0 = not yet.
        """
        self._snapshot_version += 1
        return control_pb2.ClusterSnapshot(
            version=self._snapshot_version,
            model=self._model,
            members=[_member_to_proto(member) for member in self._members.values()],
            table=self._newest_table(),
            waiting_for=self.waiting_for(),
            page_tokens=self._page_tokens,
            table_unix_s=table_unix_s,
            num_loading=self.tables.num_loading,
        )

    def _newest_table(self) -> control_pb2.RoutingTable | None:
        table = self.tables.table
        if table is not None and (
            self._table_message is None or self._table_message.version != table.version
        ):
            self._table_message = table_to_proto(table)
        return self._table_message

    def _place(self) -> None:
        """Decides who should hold which experts, when every expert worker has said what it holds."""
        experts = [member for member in self._members.values() if member.role == "expert"]
        held = self.tables.held()
        if self.tables.placement is None and all(member.worker_id in held for member in experts):
            self.tables.set_placement(self._first_placement([_host(member) for member in experts]))

    def _first_placement(self, hosts: list[ExpertHost]) -> Placement:
        held = self.tables.held()
        if any(held.values()):
            return recover_placement(self._shape, hosts, held, num_slots=self._num_slots)
        return plan_placement(self._shape, hosts, num_slots=self._num_slots)


def _host(member: MemberState) -> ExpertHost:
    domain = member.node.failure_domain if member.node else ()
    return ExpertHost(worker_id=member.worker_id, failure_domain=domain)


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
