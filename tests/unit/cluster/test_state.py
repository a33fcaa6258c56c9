"""The controller's state: what follows from sequences of reports."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.control.members import ROLE_TO_PROTO, MemberState
from cluster.placement import ExpertShape
from cluster.state import ClusterState
from cluster.topology.types import NodeTopology
from router.experts.table import RoutingTable, table_from_proto, table_to_proto
from wire.errors import ConfigError
from wire.phases import Phase
from wire.proto import control_pb2
from workers.expert.types import Slot

SHAPE = ExpertShape(num_experts=4, layer_ids=(1, 2))
MODEL = control_pb2.ModelInfo(name="tiny", vocab_tokens=300)


def node(name: str, zone: str = "a") -> NodeTopology:
    return NodeTopology(node_id=name, address="10.0.0.1", host=name, zone=zone, rack="r1", accelerator="X")


def make_state(*worker_ids: str, num_slots: int = 0) -> ClusterState:
    """Members by name, e.g. "expert-0"; nothing is started."""
    members = [MemberState(worker_id=name, role=name.rsplit("-", 1)[0]) for name in worker_ids]
    return ClusterState(members, model=MODEL, shape=SHAPE, num_slots=num_slots, page_tokens=16)


def start(state: ClusterState, worker_id: str, *, address: str = "h:1", **more: Any) -> None:
    """A process starts; an expert worker holds nothing yet."""
    role = state.member(worker_id).role
    member = MemberState(worker_id=worker_id, role=role, address=address, node=node(worker_id), **more)
    state.on_started(member)
    if role == "expert":
        state.on_described(worker_id, [], table_version=0)


def load(state: ClusterState, *worker_ids: str) -> None:
    """These expert workers, or all, carry out what they are ordered to."""
    for order in state.tables.plan_loads():
        if not worker_ids or order.worker_id in worker_ids:
            state.tables.on_loaded(order)
    state.tables.renew()


def bring_up(state: ClusterState, *worker_ids: str) -> None:
    """Starts all of them, then each is prepared and ready."""
    for worker_id in worker_ids:
        start(state, worker_id)
    load(state)
    for worker_id in worker_ids:
        state.on_ready(worker_id)


def lose(state: ClusterState, worker_id: str) -> None:
    state.on_lost(worker_id, problem="gone")
    state.tables.renew()


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


def test_placement_waits_until_every_expert_worker_has_spoken() -> None:
    state = make_state("expert-0", "expert-1", "prefill-0")
    start(state, "expert-0")
    assert state.tables.placement is None
    assert not state.is_prepared("expert-0")
    start(state, "expert-1")
    assert list(state.tables.placement or {}) == ["expert-0", "expert-1"]


def test_placement_stays_when_a_worker_is_lost() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    placement = state.tables.placement
    lose(state, "expert-0")
    state.on_started(
        MemberState(worker_id="expert-0", role="expert", address="h:2", node=node("elsewhere", "z"))
    )
    state.on_described("expert-0", [], table_version=0)
    assert state.tables.placement is placement


def test_restarted_controller_keeps_what_its_workers_hold() -> None:
    held = {"expert-0": [1, 3], "expert-1": [0, 2]}
    state = make_state("expert-0", "expert-1")
    for worker_id, experts in held.items():
        state.on_started(MemberState(worker_id=worker_id, role="expert", address="h:1", node=node("n")))
        slots = [Slot(layer, idx, expert) for layer in (1, 2) for idx, expert in enumerate(experts)]
        state.on_described(worker_id, slots, table_version=7)
    assert state.tables.renew()
    assert state.tables.plan_loads() == []
    table = table_from_proto(state.snapshot().table)
    assert table.version > 7
    homes = {replica.expert_idx: table.worker_ids[replica.worker_idx] for replica in table.layers[1].replicas}
    assert homes == {expert: worker_id for worker_id, experts in held.items() for expert in experts}


def test_table_comes_when_the_last_expert_is_covered() -> None:
    state = make_state("expert-0", "expert-1")
    for worker_id in ("expert-0", "expert-1"):
        start(state, worker_id)
    orders = {order.worker_id: order for order in state.tables.plan_loads()}
    state.tables.on_loaded(orders["expert-0"])
    assert not state.tables.renew()
    assert not state.snapshot().HasField("table")
    state.tables.on_loaded(orders["expert-1"])
    assert state.tables.renew()
    table = table_from_proto(state.snapshot().table)
    assert (table.version, table.worker_ids, list(table.layers)) == (1, ("expert-0", "expert-1"), [1, 2])


def test_table_with_replicas_comes_before_every_worker_is_ready() -> None:
    state = make_state("expert-0", "expert-1", num_slots=4)
    for worker_id in ("expert-0", "expert-1"):
        start(state, worker_id)
    load(state, "expert-1")
    assert table_workers(state) == ["expert-1"]


def test_table_without_the_lost_worker_when_replicas_exist() -> None:
    state = make_state("expert-0", "expert-1", num_slots=4)
    bring_up(state, "expert-0", "expert-1")
    before = state.table_version
    lose(state, "expert-0")
    assert table_workers(state) == ["expert-1"]
    assert state.table_version == before + 1
    bring_up(state, "expert-0")
    assert table_workers(state) == ["expert-0", "expert-1"]


def test_experts_without_a_replica_move_to_the_survivor_and_back() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    before = state.snapshot().table
    lose(state, "expert-0")
    assert state.snapshot().table == before
    load(state)
    assert table_workers(state) == ["expert-1"]
    bring_up(state, "expert-0")
    table = table_from_proto(state.snapshot().table)
    assert table.worker_ids == ("expert-0", "expert-1")
    assert len(table.layers[1].replicas) == SHAPE.num_experts


def test_table_message_is_made_once_for_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def to_proto(table: RoutingTable) -> control_pb2.RoutingTable:
        made.append(table.version)
        return table_to_proto(table)

    monkeypatch.setattr("cluster.state.table_to_proto", to_proto)
    state = make_state("expert-0", "expert-1", num_slots=4)
    bring_up(state, "expert-0", "expert-1")
    assert state.snapshot().table == state.snapshot().table
    lose(state, "expert-0")
    state.snapshot()
    assert made == [1, 2]


@pytest.mark.parametrize("worker_id", ["prefill-0", "router-0"])
def test_table_stays_when_who_holds_no_experts_comes_or_goes(worker_id: str) -> None:
    state = make_state("expert-0", "prefill-0", "router-0")
    bring_up(state, "expert-0")
    before = state.snapshot().table
    bring_up(state, worker_id)
    lose(state, worker_id)
    assert state.snapshot().table == before


def test_next_version_is_above_what_anybody_has_seen() -> None:
    state = make_state("expert-0", "decode-0")
    start(state, "decode-0")
    start(state, "expert-0")
    state.tables.on_version_seen(41)
    load(state)
    assert state.snapshot().table.version > 41
    before = state.table_version
    state.on_report("decode-0", before + 5)
    assert state.tables.renew()
    assert state.table_version > before + 5


def test_report_of_a_member_that_does_not_run_counts_for_nothing() -> None:
    state = make_state("expert-0", "decode-0")
    bring_up(state, "expert-0")
    before = state.table_version
    for member_id in ("decode-0", "expert-0", "nobody"):
        state.on_report(member_id, before + 5)
    assert not state.tables.renew()


def test_member_with_trouble_is_not_ready_until_it_has_none() -> None:
    state = make_state("expert-0", "decode-0")
    bring_up(state, "expert-0", "decode-0")
    assert state.on_trouble("decode-0", "it is leaving")
    assert not state.on_trouble("decode-0", "it is leaving")
    assert [member.is_ready for member in state.snapshot().members] == [True, False]
    assert state.waiting_for() == "1 of 2 members: decode-0 (it is leaving)"
    assert state.on_trouble("decode-0", "")
    assert [member.is_ready for member in state.snapshot().members] == [True, True]


def test_trouble_ends_with_the_process_that_had_it() -> None:
    state = make_state("expert-0", "decode-0")
    bring_up(state, "expert-0", "decode-0")
    state.on_trouble("decode-0", "it is leaving")
    lose(state, "decode-0")
    assert not state.on_trouble("decode-0", "it is leaving")
    bring_up(state, "decode-0")
    assert state.waiting_for() == ""


def test_members_keep_the_order_of_the_config() -> None:
    names = ["expert-0", "expert-1", "prefill-0", "router-0"]
    state = make_state(*names)
    bring_up(state, "router-0", "expert-1")
    assert [member.worker_id for member in state.members()] == names
    assert [member.worker_id for member in state.snapshot().members] == names


def run_loads(state: ClusterState) -> None:
    """Until nobody has anything to load or to free; nobody reads old tables."""
    state.tables.renew()
    while orders := state.tables.plan_loads():
        for order in orders:
            state.tables.on_loaded(order)
        state.tables.renew()


def test_new_workers_get_a_share_once_all_that_start_have_spoken() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    assert state.resize("expert", 4).new == ("expert-2", "expert-3")
    assert state.waiting_for() == "2 of 4 members: expert-2, expert-3"
    start(state, "expert-2")
    assert not state.is_prepared("expert-2")
    assert table_workers(state) == ["expert-0", "expert-1"]
    start(state, "expert-3")
    run_loads(state)
    assert table_workers(state) == ["expert-0", "expert-1", "expert-2", "expert-3"]
    assert {worker: len(slots) for worker, slots in state.tables.held().items()} == {
        f"expert-{i}": 2 for i in range(4)
    }


def test_new_worker_that_finds_no_node_holds_nobody_up() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    state.resize("expert", 4)
    start(state, "expert-2")
    state.on_lost("expert-3", problem="no node")
    state.place()
    run_loads(state)
    assert table_workers(state) == ["expert-0", "expert-1", "expert-2"]
    start(state, "expert-3")
    run_loads(state)
    assert table_workers(state)[-1] == "expert-3"


def phases_in_force(state: ClusterState) -> dict[str, str]:
    assert state.tables.table is not None
    return dict(state.tables.table.worker_phases)


def test_phases_stay_apart_while_workers_come_and_go_and_meet_when_too_few_are_left() -> None:
    names = ("expert-0", "expert-1", "expert-2")
    state = make_state(*names, num_slots=4)
    bring_up(state, *names)
    apart: dict[str, Phase] = {"expert-0": "prefill", "expert-1": "decode", "expert-2": "decode"}
    slots = tuple(Slot(layer, expert, expert) for layer in SHAPE.layer_ids for expert in range(4))
    state.tables.set_placement(dict.fromkeys(names, slots), worker_phases=apart)
    run_loads(state)
    state.resize("expert", 4)
    start(state, "expert-3")
    run_loads(state)
    assert sorted(phases_in_force(state).values()) == ["decode", "decode", "prefill", "prefill"]
    state.resize("expert", 2)
    run_loads(state)
    assert sorted(phases_in_force(state).values()) == ["decode", "prefill"]
    state.resize("expert", 1)
    run_loads(state)
    assert phases_in_force(state) == {}


def test_phases_of_the_controller_before_are_taken_up_if_they_name_everyone() -> None:
    for recalled, wanted in [
        ({"expert-0": "prefill", "expert-1": "decode", "expert-9": "decode"}, ["prefill", "decode"]),
        ({"expert-0": "prefill"}, []),
        ({"expert-0": "prefill", "expert-1": "prefill"}, []),
        ({"expert-0": "prefill", "expert-1": "dance"}, []),
    ]:
        state = make_state("expert-0", "expert-1", num_slots=4)
        state.recall_phases(recalled)
        bring_up(state, "expert-0", "expert-1")
        assert list(phases_in_force(state).values()) == wanted


def test_worker_leaves_when_no_table_in_use_names_it() -> None:
    state = make_state("expert-0", "expert-1", "decode-0")
    bring_up(state, "expert-0", "expert-1", "decode-0")
    state.on_report("decode-0", state.table_version)
    assert state.resize("expert", 1).leaving == ("expert-1",)
    run_loads(state)
    assert table_workers(state) == ["expert-0"]
    assert not state.tables.is_empty("expert-1")
    state.on_report("decode-0", state.table_version)
    run_loads(state)
    assert state.tables.is_empty("expert-1")
    state.on_gone("expert-1")
    assert [member.worker_id for member in state.members()] == ["expert-0", "decode-0"]
    assert state.waiting_for() == ""


def test_leaving_worker_that_is_lost_is_not_waited_for() -> None:
    state = make_state("expert-0", "expert-1")
    bring_up(state, "expert-0", "expert-1")
    state.resize("expert", 1)
    lose(state, "expert-1")
    run_loads(state)
    assert table_workers(state) == ["expert-0"]
    assert state.waiting_for() == ""
    assert state.tables.is_empty("expert-1")


def test_too_few_slots_for_fewer_workers_are_refused_and_nobody_leaves() -> None:
    state = make_state("expert-0", "expert-1", num_slots=2)
    bring_up(state, "expert-0", "expert-1")
    with pytest.raises(ConfigError, match=r"expert\.num_slots"):
        state.resize("expert", 1)
    assert state.num_workers()["expert"] == 2


def test_process_that_was_leaving_is_found_again() -> None:
    state = make_state("expert-0")
    state.on_found_leaving("expert-1", "expert")
    assert state.num_workers()["expert"] == 1
    assert state.waiting_for() == "1 of 1 members: expert-0"


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

    @rule(worker_id=st.sampled_from(EXPERTS + OTHERS))
    def step(self, worker_id: str) -> None:
        """A member takes its next step towards work; an expert worker is ready once it is prepared."""
        if self.phase[worker_id] == DOWN:
            self.starts[worker_id] += 1
            start(self.state, worker_id, incarnation=self.starts[worker_id])
            self.phase[worker_id] = STARTED
        elif worker_id in OTHERS or self.state.is_prepared(worker_id):
            self.state.on_ready(worker_id)
            self.phase[worker_id] = READY
        self._publish()

    @rule(worker_id=st.sampled_from(EXPERTS))
    def load(self, worker_id: str) -> None:
        for order in self.state.tables.plan_loads():
            if order.worker_id == worker_id:
                self.state.tables.on_loaded(order)
            else:
                self.state.tables.on_load_failed(order)
                self.state.tables.retry(order.worker_id)
        self._publish()

    @precondition(lambda self: set(self.phase.values()) != {DOWN})
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from([w for w, phase in self.phase.items() if phase != DOWN]))
        self.state.on_lost(worker_id, problem="gone")
        self.phase[worker_id] = DOWN
        self._publish()

    def _publish(self) -> None:
        self.state.tables.renew()
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
    def all_ready_and_settled_is_the_whole_table(self) -> None:
        is_whole = all(self.state.is_prepared(worker_id) for worker_id in EXPERTS)
        if is_whole:
            assert tuple(self.newest.table.worker_ids) == EXPERTS


ClusterLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestClusterLife = ClusterLife.TestCase
