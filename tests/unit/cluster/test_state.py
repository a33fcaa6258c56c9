"""The controller's state: what follows from sequences of reports."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.placement import ExpertShape
from cluster.state import ROLE_TO_PROTO, ClusterState, MemberState
from cluster.topology.types import NodeTopology
from router.experts.table import table_from_proto
from wire.proto import control_pb2

SHAPE = ExpertShape(num_experts=4, layer_ids=(1, 2))
MODEL = control_pb2.ModelInfo(name="tiny", vocab_tokens=300)


def node(name: str, zone: str = "a") -> NodeTopology:
    return NodeTopology(node_id=name, address="10.0.0.1", host=name, zone=zone, rack="r1", accelerator="X")


def make_state(*worker_ids: str, num_slots: int = 0) -> ClusterState:
    """Members by name, e.g. "expert-0"; nothing is started."""
    members = [MemberState(worker_id=name, role=name.rsplit("-", 1)[0]) for name in worker_ids]
    return ClusterState(members, model=MODEL, shape=SHAPE, num_slots=num_slots, page_tokens=16)


def start(state: ClusterState, worker_id: str, *, address: str = "h:1", **more: Any) -> None:
    role = state.member(worker_id).role
    member = MemberState(worker_id=worker_id, role=role, address=address, node=node(worker_id), **more)
    state.on_started(member)


def bring_up(state: ClusterState, *worker_ids: str) -> None:
    """Starts all of them, then each is prepared and ready."""
    for worker_id in worker_ids:
        start(state, worker_id)
    if any(member.role == "expert" for member in state.members()):
        state.placement()
    for worker_id in worker_ids:
        state.on_ready(worker_id)


def table_workers(state: ClusterState) -> list[str]:
    snapshot = state.snapshot()
    return list(snapshot.table.worker_ids) if snapshot.HasField("table") else []


def test_nothing_started_waits_for_everybody_and_has_no_table() -> None:
    state = make_state("expert-0", "prefill-0")
    snapshot = state.snapshot()
    assert (snapshot.version, snapshot.page_tokens, snapshot.model) == (1, 16, MODEL)
    assert not snapshot.HasField("table")
    assert state.table_version == 0
    assert snapshot.waiting_for == "2 of 2 members: expert-0, prefill-0"


def test_snapshots_count_up_by_one() -> None:
    state = make_state("expert-0")
    assert [state.snapshot().version for _ in range(4)] == [1, 2, 3, 4]


def test_started_member_can_be_reached_but_is_not_ready() -> None:
    state = make_state("prefill-0")
    start(
        state,
        "prefill-0",
        address="10.0.0.9:77",
        metrics_address="10.0.0.9:78",
        num_pages=64,
        incarnation=1_700_000_000,
    )
    (member,) = state.snapshot().members
    assert member == control_pb2.Member(
        worker_id="prefill-0",
        role=control_pb2.ROLE_PREFILL,
        address="10.0.0.9:77",
        metrics_address="10.0.0.9:78",
        node=control_pb2.NodeInfo(
            node_id="prefill-0", host="prefill-0", zone="a", rack="r1", accelerator="X"
        ),
        incarnation=1_700_000_000,
        num_pages=64,
    )


def test_report_of_a_start_is_not_one_of_readiness() -> None:
    state = make_state("decode-0")
    start(state, "decode-0", is_ready=True, problem="slow disk")
    assert not state.member("decode-0").is_ready
    assert state.waiting_for() == "1 of 1 members: decode-0 (slow disk)"
    state.on_ready("decode-0")
    assert state.member("decode-0").problem == ""


@pytest.mark.parametrize("role", ROLE_TO_PROTO)
def test_every_role_has_its_name_on_the_wire(role: str) -> None:
    (member,) = make_state(f"{role}-0").snapshot().members
    assert control_pb2.Role.Name(member.role) == f"ROLE_{role.upper()}"


def test_incarnation_is_what_the_process_reports() -> None:
    """Not counted here: a restarted controller must give a process that ran on the same number."""
    state = make_state("decode-0")
    for started_s in (1_700_000_000, 1_700_000_009):
        start(state, "decode-0", incarnation=started_s)
        state.on_ready("decode-0")
        assert state.snapshot().members[0].incarnation == started_s


def test_lost_member_has_no_address_and_says_why() -> None:
    state = make_state("decode-0", "decode-1")
    bring_up(state, "decode-0", "decode-1")
    state.on_lost("decode-0", problem="killed")
    snapshot = state.snapshot()
    assert (snapshot.members[0].address, snapshot.members[0].is_ready) == ("", False)
    assert snapshot.waiting_for == "1 of 2 members: decode-0 (killed)"
    bring_up(state, "decode-0")
    assert state.snapshot().waiting_for == ""


def test_waiting_for_names_four_at_most() -> None:
    state = make_state(*(f"decode-{i}" for i in range(6)))
    assert state.waiting_for() == "6 of 6 members: decode-0, decode-1, decode-2, decode-3, ..."
    bring_up(state, "decode-4", "decode-5")
    assert state.waiting_for() == "4 of 6 members: decode-0, decode-1, decode-2, decode-3"


def test_placement_waits_until_every_expert_worker_has_a_node() -> None:
    state = make_state("expert-0", "expert-1", "prefill-0")
    start(state, "expert-0")
    assert state.placement() is None
    start(state, "expert-1")
    placement = state.placement()
    assert placement is not None
    assert list(placement) == ["expert-0", "expert-1"]


def test_placement_is_decided_once() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    placement = state.placement()
    state.on_lost("expert-0", problem="gone")
    state.on_started(
        MemberState(worker_id="expert-0", role="expert", address="h:2", node=node("elsewhere", "z"))
    )
    assert state.placement() is placement


def test_table_comes_when_the_last_expert_is_covered() -> None:
    state = make_state("expert-0", "expert-1")
    for worker_id in ("expert-0", "expert-1"):
        start(state, worker_id)
    state.placement()
    state.on_ready("expert-0")
    assert not state.snapshot().HasField("table")
    state.on_ready("expert-1")
    table = table_from_proto(state.snapshot().table)
    assert (table.version, table.worker_ids, list(table.layers)) == (1, ("expert-0", "expert-1"), [1, 2])


def test_table_with_replicas_comes_before_every_worker_is_ready() -> None:
    state = make_state("expert-0", "expert-1", num_slots=4)
    for worker_id in ("expert-0", "expert-1"):
        start(state, worker_id)
    state.placement()
    state.on_ready("expert-1")
    assert table_workers(state) == ["expert-1"]


def test_table_without_the_lost_worker_when_replicas_exist() -> None:
    state = make_state("expert-0", "expert-1", num_slots=4)
    bring_up(state, "expert-0", "expert-1")
    before = state.table_version
    state.on_lost("expert-0", problem="gone")
    assert table_workers(state) == ["expert-1"]
    assert state.table_version == before + 1
    bring_up(state, "expert-0")
    assert table_workers(state) == ["expert-0", "expert-1"]


def test_table_stays_when_the_lost_worker_has_no_replica() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    before = state.snapshot().table
    state.on_lost("expert-0", problem="gone")
    assert state.snapshot().table == before


def test_table_is_renewed_when_the_only_holder_is_back() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    state.on_lost("expert-0", problem="gone")
    before = state.table_version
    bring_up(state, "expert-0")
    assert state.table_version == before + 1


@pytest.mark.parametrize("worker_id", ["prefill-0", "router-0"])
def test_table_stays_when_who_holds_no_experts_comes_or_goes(worker_id: str) -> None:
    state = make_state("expert-0", "prefill-0", "router-0")
    bring_up(state, "expert-0")
    before = state.snapshot().table
    bring_up(state, worker_id)
    state.on_lost(worker_id, problem="gone")
    assert state.snapshot().table == before


def test_next_version_is_above_what_any_worker_has_seen() -> None:
    state = make_state("expert-0")
    start(state, "expert-0")
    state.placement()
    state.on_version_seen(41)
    state.on_version_seen(7)
    assert state.next_table_version == 42
    state.on_ready("expert-0")
    assert state.snapshot().table.version == 42
    assert state.table_version == 42


def test_members_keep_the_order_of_the_config() -> None:
    names = ["expert-0", "expert-1", "prefill-0", "router-0"]
    state = make_state(*names)
    bring_up(state, "router-0", "expert-1")
    assert [member.worker_id for member in state.members()] == names
    assert [member.worker_id for member in state.snapshot().members] == names


EXPERTS = ("expert-0", "expert-1", "expert-2")
OTHERS = ("prefill-0", "router-0")
STARTED, READY, DOWN = "started", "ready", "down"


class ClusterLife(RuleBasedStateMachine):
    """Members come and go in any order that the controller can produce."""

    @initialize(num_slots=st.sampled_from([0, 3, 4]))
    def begin(self, num_slots: int) -> None:
        self.state = make_state(*EXPERTS, *OTHERS, num_slots=num_slots)
        self.phase = dict.fromkeys((*EXPERTS, *OTHERS), DOWN)
        self.starts = dict.fromkeys(self.phase, 0)
        self.newest = self.state.snapshot()
        self.seen_version = 0

    @rule(worker_id=st.sampled_from(EXPERTS + OTHERS))
    def step(self, worker_id: str) -> None:
        """A member takes its next step towards work; an expert worker only once it has a placement."""
        if self.phase[worker_id] == DOWN:
            self.starts[worker_id] += 1
            start(self.state, worker_id, incarnation=self.starts[worker_id])
            self.phase[worker_id] = STARTED
        elif worker_id in OTHERS or self.state.placement() is not None:
            self.state.on_ready(worker_id)
            self.phase[worker_id] = READY
        self._publish()

    @precondition(lambda self: set(self.phase.values()) != {DOWN})
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from([w for w, phase in self.phase.items() if phase != DOWN]))
        self.state.on_lost(worker_id, problem="gone")
        self.phase[worker_id] = DOWN
        self._publish()

    @rule(version=st.integers(0, 100))
    def see_version(self, version: int) -> None:
        self.state.on_version_seen(version)
        self.seen_version = max(self.seen_version, version)

    def _publish(self) -> None:
        older, self.newest = self.newest, self.state.snapshot()
        assert self.newest.version == older.version + 1
        assert self.newest.HasField("table") or not older.HasField("table")
        if older.HasField("table"):
            assert self.newest.table.version >= older.table.version
            is_same = self.newest.table.version == older.table.version
            assert not is_same or self.newest.table == older.table

    @invariant()
    def members_are_as_reported(self) -> None:
        for member in self.newest.members:
            assert member.is_ready == (self.phase[member.worker_id] == READY)
            assert bool(member.address) == (self.phase[member.worker_id] != DOWN)
            assert member.incarnation == self.starts[member.worker_id]
        assert (self.newest.waiting_for == "") == (set(self.phase.values()) == {READY})

    @invariant()
    def table_is_whole_and_its_workers_hold_their_slots(self) -> None:
        if not self.newest.HasField("table"):
            return
        table = table_from_proto(self.newest.table)
        placement = self.state.placement()
        assert placement is not None
        assert all(self.starts[worker_id] for worker_id in table.worker_ids)
        for layer_idx, routes in table.layers.items():
            for replica in routes.replicas:
                slots = placement[table.worker_ids[replica.worker_idx]]
                found = [
                    (s.expert_idx)
                    for s in slots
                    if (s.layer_idx, s.slot_idx) == (layer_idx, replica.slot_idx)
                ]
                assert found == [replica.expert_idx]

    @invariant()
    def ready_workers_that_cover_every_expert_are_the_table(self) -> None:
        placement = self.state.placement()
        ready = [worker_id for worker_id in EXPERTS if self.phase[worker_id] == READY]
        if placement is None:
            return
        held = {(s.layer_idx, s.expert_idx) for worker_id in ready for s in placement[worker_id]}
        if len(held) == len(SHAPE.layer_ids) * SHAPE.num_experts:
            assert list(self.newest.table.worker_ids) == ready

    @invariant()
    def next_version_is_above_all_that_was_seen(self) -> None:
        assert self.state.next_table_version > max(self.seen_version, self.newest.table.version)


ClusterLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestClusterLife = ClusterLife.TestCase
