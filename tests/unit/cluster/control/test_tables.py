"""The life of routing tables: nothing in use is freed, every copy that is named is held, versions grow."""

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.control.tables import LoadOrder, TableLife
from cluster.placement import ExpertHost, ExpertShape, Placement, plan_placement
from router.experts.table import RoutingTable
from wire.phases import Phase
from workers.expert.types import Place, Slot

SHAPE = ExpertShape(num_experts=4, layer_ids=(1,))
ALL = frozenset((1, expert) for expert in range(4))


def placed(**experts: list[int]) -> Placement:
    return {
        worker: tuple(Slot(1, i, expert) for i, expert in enumerate(held)) for worker, held in experts.items()
    }


def obey(life: TableLife, *workers: str) -> list[LoadOrder]:
    """These workers, or all, carry out their orders; the table is renewed; the orders."""
    orders = [order for order in life.plan_loads() if not workers or order.worker_id in workers]
    for order in orders:
        life.on_loaded(order)
    life.renew()
    return orders


def made(placement: Placement) -> TableLife:
    """Every worker of a placement holds what it should, and table 1 says so."""
    life = TableLife(SHAPE)
    for worker_id in placement:
        life.on_worker(worker_id, [], table_version=0)
    life.set_placement(placement)
    obey(life)
    return life


def homes(table: RoutingTable | None) -> Mapping[int, list[str]]:
    assert table is not None
    found: dict[int, list[str]] = {}
    for replica in table.layers[1].replicas:
        found.setdefault(replica.expert_idx, []).append(table.worker_ids[replica.worker_idx])
    return found


def holders(life: TableLife) -> set[str]:
    return {worker_id for workers in homes(life.table).values() for worker_id in workers}


def experts(life: TableLife, worker_id: str) -> list[int]:
    return sorted(slot.expert_idx for slot in life.held()[worker_id])


def test_worked_example_prepare_activate_free() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.on_reader_started("decode-0")
    life.on_reader("decode-0", 1)
    life.set_placement(placed(a=[1], b=[0, 2, 3]))
    (order,) = life.plan_loads()
    assert (order.worker_id, order.table_version, order.num_new) == ("b", 2, 1)
    assert not life.renew(), "published before it was loaded"
    life.on_loaded(order)
    assert life.renew()
    assert homes(life.table)[0] == ["b"]
    assert life.plan_loads() == [], "freed while table 1 is in use"
    life.on_reader("decode-0", 2)
    assert [order.worker_id for order in obey(life)] == ["a"]
    assert experts(life, "a") == [1]


def test_slots_are_kept_while_nobody_knows_what_a_new_reader_uses() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.on_reader_started("decode-0")
    life.set_placement(placed(a=[1], b=[0, 2, 3]))
    obey(life)
    assert obey(life) == []
    life.on_reader_lost("decode-0")
    assert [order.worker_id for order in obey(life)] == ["a"]


def test_reader_of_an_earlier_controllers_table_keeps_everything() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.on_reader("decode-0", 57)
    assert life.renew()
    assert life.table is not None
    assert life.table.version > 57
    life.set_placement(placed(a=[1], b=[0, 2, 3]))
    obey(life)
    assert obey(life) == []
    life.on_reader("decode-0", life.table.version)
    assert [order.worker_id for order in obey(life)] == ["a"]


def test_expert_keeps_its_slot_and_a_new_one_gets_a_free_slot() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.set_placement(placed(a=[1, 2], b=[0, 3]))
    orders = {order.worker_id: order for order in life.plan_loads()}
    assert orders["a"].slots == (Slot(1, 0, 0), Slot(1, 1, 1), Slot(1, 2, 2))
    assert orders["b"].slots == (Slot(1, 0, 2), Slot(1, 1, 3), Slot(1, 2, 0))


def test_lost_worker_with_replicas_leaves_the_table_at_once() -> None:
    life = made(placed(a=[0, 1, 2, 3], b=[0, 1, 2, 3]))
    life.on_worker_lost("a")
    assert life.renew()
    assert holders(life) == {"b"}


def test_loss_is_mended_while_another_worker_still_loads() -> None:
    life = made(placed(a=[0, 1], b=[0, 1, 2], c=[2, 3]))
    life.set_placement(placed(a=[0, 1], b=[0, 1, 2], c=[2, 3, 0]))
    assert len(life.plan_loads()) == 1
    life.on_worker_lost("a")
    assert life.renew()
    assert homes(life.table) == {0: ["b"], 1: ["b"], 2: ["b", "c"], 3: ["c"]}


def test_orphans_of_two_lost_workers_go_to_the_last_and_home_again() -> None:
    life = made(placed(a=[0, 1], b=[2], c=[3]))
    life.on_worker_lost("a")
    life.on_worker_lost("b")
    assert not life.renew()
    (order,) = life.plan_loads()
    assert (order.worker_id, order.num_new) == ("c", 3)
    life.on_loaded(order)
    assert life.renew()
    assert holders(life) == {"c"}
    life.on_worker("a", [], table_version=0)
    assert [order.worker_id for order in obey(life)] == ["a"]
    assert homes(life.table) == {0: ["a"], 1: ["a"], 2: ["c"], 3: ["c"]}
    assert [order.worker_id for order in obey(life)] == ["c"]
    assert experts(life, "c") == [2, 3]


def test_nothing_is_rescued_before_the_first_table() -> None:
    life = TableLife(SHAPE)
    for worker_id in ("a", "b"):
        life.on_worker(worker_id, [], table_version=0)
    life.set_placement(placed(a=[0, 1], b=[2, 3]))
    life.on_worker_lost("b")
    life.renew()
    assert [(order.worker_id, order.num_new) for order in life.plan_loads()] == [("a", 2)]


def test_worker_without_orders_after_a_failure_until_retry() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.set_placement(placed(a=[0, 1, 2], b=[2, 3]))
    (order,) = life.plan_loads()
    assert life.num_loading == 1
    life.on_load_failed(order)
    assert (life.num_loading, life.is_settled, life.plan_loads()) == (0, False, [])
    life.retry("a")
    assert len(life.plan_loads()) == 1


def test_answer_of_a_process_that_was_lost_counts_for_nothing() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.set_placement(placed(a=[0, 1, 2], b=[2, 3]))
    (order,) = life.plan_loads()
    life.on_worker_lost("a")
    life.on_worker("a", [], table_version=0)
    life.on_loaded(order)
    assert experts(life, "a") == []


def test_shares_of_a_placement_are_in_its_table() -> None:
    life = made(placed(a=[0, 1, 2], b=[2, 3]))
    life.set_placement(placed(a=[0, 1, 2], b=[2, 3]), {(1, 2): {"a": 0.25, "b": 0.75}})
    assert life.renew()
    assert life.table is not None
    shares = {r.worker_idx: r.share for r in life.table.layers[1].replicas if r.expert_idx == 2}
    assert shares == {0: 0.25, 1: 0.75}


def test_phases_come_into_force_when_all_is_loaded() -> None:
    life = made(placed(a=[0, 1, 2, 3], b=[2, 3]))
    apart: dict[str, Phase] = {"a": "prefill", "b": "decode"}
    life.set_placement(placed(a=[0, 1, 2, 3], b=[0, 1, 2, 3]), worker_phases=apart)
    (order,) = life.plan_loads()
    assert not life.renew()
    life.on_loaded(order)
    assert life.renew()
    assert life.table is not None
    assert life.table.worker_phases == apart
    life.on_worker_lost("b")
    assert life.renew()
    assert life.table.worker_phases == {"a": "prefill"}
    assert life.table.routes(1, "decode").copies_E == ((0,),) * 4


def test_phases_alone_make_another_table() -> None:
    placement = placed(a=[0, 1, 2, 3], b=[0, 1, 2, 3])
    life = made(placement)
    life.set_placement(placement, worker_phases={"a": "prefill", "b": "decode"})
    assert life.renew()
    life.set_placement(placement, worker_phases={"a": "decode", "b": "prefill"})
    assert life.renew()
    life.set_placement(placement)
    assert life.renew()
    assert life.table is not None
    assert (life.table.version, life.table.worker_phases) == (4, {})


def test_integrity_check_catches_a_copy_that_is_freed_in_use() -> None:
    life = made(placed(a=[0, 1], b=[2, 3]))
    life.check_integrity()
    life._loading["a"] = LoadOrder(worker_id="a", table_version=2, slots=(Slot(1, 0, 0),), num_new=0)
    with pytest.raises(RuntimeError, match=r"a frees \[\(1, 1\)\]"):
        life.check_integrity()


WORKERS = ("a", "b", "c")
READERS = ("decode-0", "prefill-0")


class Life(RuleBasedStateMachine):
    """A model of the cluster beside the decisions: processes that hold experts, readers that use tables."""

    @initialize(num_slots=st.sampled_from([0, 3]))
    def begin(self, num_slots: int) -> None:
        self.life = TableLife(SHAPE)
        self.hosts = [ExpertHost(worker_id=worker) for worker in WORKERS]
        self.life.set_placement(plan_placement(SHAPE, self.hosts, num_slots=num_slots))
        self.held: dict[str, set[Place]] = {}
        self.orders: list[LoadOrder] = []
        self.tables: dict[int, RoutingTable] = {}
        self.born_at: dict[str, int] = {}
        """Worker -> newest version when its process started: older tables name what the one before held."""
        self.reads: dict[str, int] = {}
        self.worker_phases: dict[str, Phase] = {}
        self._follow_up()

    @rule(worker=st.sampled_from(WORKERS))
    def start_or_lose(self, worker: str) -> None:
        if worker in self.held:
            del self.held[worker]
            self.orders = [order for order in self.orders if order.worker_id != worker]
            self.life.on_worker_lost(worker)
        else:
            self.held[worker] = set()
            self.born_at[worker] = max(self.tables, default=0)
            self.life.on_worker(worker, [], table_version=0)
        self._follow_up()

    @rule(data=st.data(), fails=st.booleans())
    def carry_out(self, data: st.DataObject, fails: bool) -> None:
        if not self.orders:
            return
        order = self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1)))
        if fails:
            self.life.on_load_failed(order)
            self.life.retry(order.worker_id)
        else:
            self.held[order.worker_id] = {slot.place for slot in order.slots}
            self.life.on_loaded(order)
        self._follow_up()

    @rule(reader=st.sampled_from(READERS))
    def reader_comes_or_goes(self, reader: str) -> None:
        if reader in self.reads:
            del self.reads[reader]
            self.life.on_reader_lost(reader)
        else:
            self.reads[reader] = max(self.tables, default=0)
            self.life.on_reader_started(reader)
        self._follow_up()

    @rule(data=st.data())
    def reader_takes_a_newer_table(self, data: st.DataObject) -> None:
        """Any newer one: a watcher may miss versions."""
        if self.reads and self.tables:
            reader = data.draw(st.sampled_from(sorted(self.reads)))
            newer = [version for version in self.tables if version >= self.reads[reader]]
            self.reads[reader] = data.draw(st.sampled_from(newer))
            self.life.on_reader(reader, self.reads[reader])
            self._follow_up()

    @rule(shift=st.integers(1, 3), extra=st.integers(0, 3), phases=st.text("pdx", min_size=3, max_size=3))
    def place_anew(self, shift: int, extra: int, phases: str) -> None:
        placement: dict[str, tuple[Slot, ...]] = {}
        for idx, worker in enumerate(WORKERS):
            wanted = {(expert + shift) % 4 for expert in range(4) if expert % 3 == idx} | (
                {extra} if idx == 0 else set()
            )
            placement[worker] = tuple(Slot(1, i, expert) for i, expert in enumerate(sorted(wanted)))
        names: dict[str, Phase] = {"p": "prefill", "d": "decode"}
        self.worker_phases = {w: names[p] for w, p in zip(WORKERS, phases, strict=True) if p in names}
        self.life.set_placement(placement, worker_phases=self.worker_phases)
        self._follow_up()

    def _follow_up(self) -> None:
        before = max(self.tables, default=0)
        if self.life.renew():
            table = self.life.table
            assert table is not None
            assert table.version > before
            self.tables[table.version] = table
            for replica in table.layers[1].replicas:
                worker = table.worker_ids[replica.worker_idx]
                assert (1, replica.expert_idx) in self.held[worker], "published before it was loaded"
            assert set(homes(table)) == set(range(4))
        self.orders += self.life.plan_loads()
        self.life.check_integrity()

    @invariant()
    def no_order_frees_what_is_in_use(self) -> None:
        in_use = [*self.reads.values(), max(self.tables, default=0)]
        for version in in_use:
            table = self.tables.get(version)
            for replica in table.layers[1].replicas if table else ():
                worker, place = table.worker_ids[replica.worker_idx], (1, replica.expert_idx)
                if worker in self.held and self.born_at[worker] < version:
                    assert place in self.held[worker], f"table {version} names {place} of {worker}"

    @invariant()
    def when_all_orders_are_done_the_table_is_the_placement(self) -> None:
        if len(self.held) == len(WORKERS) and not self.orders:
            placement = self.life.placement or {}
            found = homes(self.life.table)
            assert {(1, e): sorted(w) for e, w in found.items()} == {
                place: sorted(w for w, places in placement.items() if place in places) for place in ALL
            }
            assert self.life.table is not None
            assert self.life.table.worker_phases == self.worker_phases


Life.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
