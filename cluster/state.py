"""The controller's state and what follows from it: members, placement, snapshots. Pure: no clock, no I/O.

Level-triggered: an event changes what is known, `snapshot` is computed from what is known now. A restarted
controller that hears the same reports publishes the same table under a higher version.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.balance.phases import WorkerPhases, least_workers, plan_parts, plan_phases
from cluster.balance.window import PhaseLoads
from cluster.control.balancing import Placed
from cluster.control.members import (
    ATTENTION_ROLES,
    MemberState,
    Resize,
    check_role_change,
    count_roles,
    member_to_proto,
    plan_resize,
)
from cluster.control.numbering import number_slots
from cluster.control.recovery import recover_placement
from cluster.control.tables import TableLife
from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement, slots_per_layer
from router.experts.table import table_to_proto
from wire.errors import NotReady
from wire.phases import PHASES
from wire.proto import control_pb2
from workers.expert.types import Slot


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
        self._loads: PhaseLoads = {}
        """Rows that experts had lately."""
        self._recalled_phases: Mapping[str, str] = {}
        """Which expert workers took the rows of which phase under the controller before."""
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
        before = self._members[member.worker_id]
        self._members[member.worker_id] = replace(
            member, is_ready=False, is_leaving=before.is_leaving, assigned_role=before.assigned_role
        )
        if member.role in ATTENTION_ROLES:
            self.tables.on_reader_started(member.worker_id)

    def on_described(self, worker_id: str, slots: Iterable[Slot], *, table_version: int) -> None:
        """An expert worker says what it holds, and for which table it loaded that."""
        self.tables.on_worker(worker_id, slots, table_version=table_version)
        self.place()

    def on_ready(self, worker_id: str) -> None:
        """A member can work: an expert worker holds what it should."""
        self._members[worker_id] = replace(self._members[worker_id], is_ready=True, problem="")

    def on_lost(self, worker_id: str, *, problem: str) -> None:
        """A process is gone or does not answer."""
        lost = self._members[worker_id]
        self._members[worker_id] = replace(
            lost, address="", metrics_address="", is_ready=False, problem=problem, trouble=""
        )
        if lost.role == "expert":
            self.tables.on_worker_lost(worker_id)
        elif lost.role in ATTENTION_ROLES:
            self.tables.on_reader_lost(worker_id)

    def on_report(self, member_id: str, table_version: int) -> bool:
        """An attention worker says which table it uses; nothing is believed of one that does not run.

        Returns:
            Whether that is news.
        """
        return self._is_running_reader(member_id) and self.tables.on_reader(member_id, table_version)

    def on_trouble(self, member_id: str, trouble: str) -> bool:
        """An attention worker says why it takes no requests, or that it takes them ("").

        Returns:
            Whether that is news.
        """
        if not self._is_running_reader(member_id) or self._members[member_id].trouble == trouble:
            return False
        self._members[member_id] = replace(self._members[member_id], trouble=trouble)
        return True

    def is_prepared(self, worker_id: str) -> bool:
        """Whether an expert worker holds all that a placement gives it."""
        return worker_id in (self.tables.placement or {}) and self.tables.is_prepared(worker_id)

    # ---- how many, and who holds what ----

    @property
    def num_experts(self) -> int:
        """Logical experts of each layer."""
        return self._shape.num_experts

    def num_workers(self) -> dict[str, int]:
        """Role -> members that are to stay, of the roles that can change."""
        return count_roles(self._members.values())

    def resize(self, role: str, num_workers: int) -> Resize:
        """Changes how many members a role has; they come, or begin to leave.

        Raises:
            ConfigError: too few: for the experts' slots, or to serve at all.
        """
        plan = plan_resize(self.members(), role, num_workers)
        if role == "expert":
            slots_per_layer(self._shape.num_experts, num_workers, self._num_slots)
        for worker_id in plan.new:
            self._members[worker_id] = MemberState(worker_id=worker_id, role=role)
        for worker_id in (*plan.staying, *plan.leaving):
            is_leaving = worker_id in plan.leaving
            self._members[worker_id] = replace(self._members[worker_id], is_leaving=is_leaving)
        self.place()
        return plan

    def set_role(self, worker_id: str, role: str) -> None:
        """Has an attention worker work in another role from now on, also after it was started again.

        Raises:
            InvalidRequest: no such worker or role.
            ConfigError: nobody would do what it does now.
        """
        check_role_change(self.members(), worker_id, role)
        self.recall_roles({worker_id: role})

    def recall_roles(self, roles: Mapping[str, str]) -> None:
        """Workers have had these roles before; those that do not exist are left out."""
        for worker_id in roles.keys() & self._members.keys():
            self._members[worker_id] = replace(self._members[worker_id], assigned_role=roles[worker_id])

    def assigned_roles(self) -> dict[str, str]:
        """Worker -> role, of those that do not work in that of their group."""
        return {m.worker_id: m.assigned_role for m in self._members.values() if m.duty != m.role}

    def on_found_leaving(self, worker_id: str, role: str) -> None:
        """A process runs that is none of the members: it was leaving when the controller before died."""
        self._members[worker_id] = MemberState(worker_id=worker_id, role=role, is_leaving=True)

    def on_gone(self, worker_id: str) -> None:
        """A member that was leaving has left."""
        self.on_lost(worker_id, problem="left")
        del self._members[worker_id]

    def recall_phases(self, phases: Mapping[str, str]) -> None:
        """Expert workers took the rows of these phases under the controller before."""
        self._recalled_phases = phases

    def on_loads(self, loads: PhaseLoads) -> None:
        """How many rows experts had lately: what new placements are planned for."""
        self._loads = loads

    def place(self) -> None:
        """Decides who should hold which experts, whenever those who can have changed.

        The first time all expert workers must have said what they hold; later, those that start for the first
        time are waited for together, and those that are lost keep their part.
        """
        experts = [m for m in self._members.values() if m.role == "expert" and not m.is_leaving]
        held = self.tables.held()
        placement = self.tables.placement
        if placement is None:
            if all(member.worker_id in held for member in experts):
                hosts = [self._host(member.worker_id) for member in experts]
                self.tables.set_placement(
                    self._first_placement(hosts), worker_phases=self._first_phases(hosts)
                )
            return
        new = [m for m in experts if m.worker_id not in placement]
        if any(m.worker_id not in held and not m.problem for m in new):
            return
        worker_ids = [m.worker_id for m in experts if m.worker_id in placement or m.worker_id in held]
        if set(worker_ids) != set(placement):
            hosts = [self._host(worker_id) for worker_id in worker_ids]
            phases = self._plan_phases(hosts)
            planned = plan_parts(
                self._shape,
                hosts,
                self._loads,
                num_slots=self._num_slots,
                previous=self.placed().placement,
                worker_phases=phases,
            )
            self.tables.set_placement(planned, worker_phases=phases)

    def placed(self) -> Placed:
        """What is placed where now.

        Raises:
            NotReady: nothing is placed yet.
        """
        placement = self.tables.placement
        if placement is None:
            raise NotReady(f"no expert is placed yet; waiting for {self.waiting_for()}")
        return Placed(
            shape=self._shape,
            hosts=[self._host(worker_id) for worker_id in placement],
            num_slots=self._num_slots,
            placement={worker_id: number_slots({}, places) for worker_id, places in placement.items()},
            worker_phases=self.tables.worker_phases,
        )

    @property
    def snapshot_version(self) -> int:
        """Version of the newest snapshot; 0 = none yet."""
        return self._snapshot_version

    @property
    def table_version(self) -> int:
        """Version of the newest table; 0 = none yet."""
        return self.tables.table.version if self.tables.table else 0

    def waiting_for(self) -> str:
        """What stands between now and a whole cluster; "" when nothing does."""
        staying = [member for member in self._members.values() if not member.is_leaving]
        missing = [member for member in staying if not member.can_work]
        if not missing:
            return ""
        whys = [(member.worker_id, member.trouble or member.problem) for member in missing[:4]]
        named = ", ".join(f"{worker_id} ({why})" if why else worker_id for worker_id, why in whys)
        return f"{len(missing)} of {len(staying)} members: {named}{', ...' if len(missing) > 4 else ''}"

    def snapshot(self, *, table_unix_s: float = 0.0) -> control_pb2.ClusterSnapshot:
        """The next snapshot; its version is one above the last.

        Args:
            table_unix_s: when the newest table was published, in Unix time; 0 = not yet.
        """
        self._snapshot_version += 1
        return control_pb2.ClusterSnapshot(
            version=self._snapshot_version,
            model=self._model,
            members=[member_to_proto(member) for member in self._members.values()],
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

    def _is_running_reader(self, member_id: str) -> bool:
        member = self._members.get(member_id)
        return member is not None and member.role in ATTENTION_ROLES and bool(member.address)

    def _host(self, worker_id: str) -> ExpertHost:
        node = self._members[worker_id].node
        return ExpertHost(worker_id=worker_id, failure_domain=node.failure_domain if node else ())

    def _plan_phases(self, hosts: list[ExpertHost]) -> WorkerPhases:
        """Who takes which rows now that workers came or left; the balancer is who parts phases first."""
        before = self.tables.worker_phases
        least = least_workers(self._shape.num_experts, self._num_slots)
        return plan_phases(hosts, self._loads, least=least, previous=before) if before else {}

    def _first_phases(self, hosts: list[ExpertHost]) -> WorkerPhases:
        recalled = self._recalled_phases
        phases = {
            host.worker_id: phase
            for host in hosts
            for phase in PHASES
            if recalled.get(host.worker_id) == phase
        }
        is_whole = len(phases) == len(hosts) and set(phases.values()) == set(PHASES)
        return phases if is_whole else {}

    def _first_placement(self, hosts: list[ExpertHost]) -> Placement:
        held = self.tables.held()
        if any(held.values()):
            return recover_placement(self._shape, hosts, held, num_slots=self._num_slots)
        return plan_placement(self._shape, hosts, num_slots=self._num_slots)
