"""The life of routing tables: prepare, activate, free. A pure state machine.

Workers load what the next table needs, it is published, and what no table in use names is freed. Events
come in, orders to load and tables come out.

Worked example: table 1 has expert 0 on worker a; the placement now wants it on b. `plan_loads` orders b to
load it. When b has (`on_loaded`), `renew` makes table 2 with expert 0 on b, and a still holds its copy.
When every attention worker has reported version 2 (`on_reader`), `plan_loads` orders a to hold the rest
without expert 0.

Level-triggered: every decision is computed from what is known now, so a controller that starts again and
hears the same reports comes to the same table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.balance.phases import WorkerPhases
from cluster.control.numbering import number_slots
from cluster.control.rescue import plan_rescue
from cluster.control.routes import Copies, Shares, build_routes, weigh_copies
from cluster.placement import ExpertShape, Placement
from router.experts.table import RoutingTable
from workers.expert.types import Place, Slot

_VERSIONS_OF_A_CONTROLLER = 1000
"""A controller that starts again leaves out this many: the one before may have published tables that no
expert worker has heard of."""


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """What an expert worker is told to hold, exactly."""

    worker_id: str
    table_version: int
    """The table that it is prepared for."""
    slots: tuple[Slot, ...]
    num_new: int
    """Experts among them that it has to load."""


class TableLife:
    """Who holds what, who should, and which tables are in use; one thread uses it."""

    def __init__(self, shape: ExpertShape) -> None:
        self._places = [(layer, expert) for layer in shape.layer_ids for expert in range(shape.num_experts)]
        self._shape = shape
        self._home: Mapping[str, frozenset[Place]] | None = None
        """What the placement gives each worker."""
        self._shares: Shares = {}
        self._worker_phases: WorkerPhases = {}
        self._rescue: dict[Place, str] = {}
        self._held: dict[str, dict[Place, int]] = {}
        """Of every worker that lives: place -> slot."""
        self._loading: dict[str, LoadOrder] = {}
        self._failed: set[str] = set()
        """Workers whose last load failed; they get no order until `retry`."""
        self._readers: dict[str, int] = {}
        """Attention worker -> version that it uses; 0 = not known, it may be any."""
        self._named: dict[int, Mapping[str, frozenset[Place]]] = {}
        """Version -> what it names of each worker; of every table that may be in use."""
        self._copies: Copies = {}
        """What the newest table names."""
        self._table_phases: WorkerPhases = {}
        """Who takes which rows in the newest table."""
        self._version = 0
        self._has_news = True
        """Something happened since the last `renew` that may ask for another table."""
        self.table: RoutingTable | None = None
        """The newest table; None until every expert has been held by somebody."""

    @property
    def next_version(self) -> int:
        """The version that is prepared now."""
        return self._version + 1

    @property
    def placement(self) -> Mapping[str, frozenset[Place]] | None:
        """What each worker should hold; None before the first placement."""
        return self._home

    @property
    def shares(self) -> Shares:
        """How the placement shares out the rows of experts with several copies."""
        return self._shares

    @property
    def worker_phases(self) -> WorkerPhases:
        """Which workers take the rows of which phase; empty = all take the rows of both."""
        return self._worker_phases

    @property
    def num_missing(self) -> int:
        """Copies that workers which live should hold and do not yet."""
        return sum(len(self._target(worker_id) - self._usable(worker_id)) for worker_id in self._held)

    @property
    def is_settled(self) -> bool:
        """Every worker that lives holds all that it should, and the newest table says so."""
        return all(self.is_prepared(worker_id) for worker_id in self._held)

    @property
    def num_loading(self) -> int:
        """Experts that are being loaded now."""
        return sum(order.num_new for order in self._loading.values())

    def held(self) -> Mapping[str, tuple[Slot, ...]]:
        """What every worker that lives holds."""
        return {
            worker_id: tuple(sorted(Slot(layer, slot, expert) for (layer, expert), slot in places.items()))
            for worker_id, places in self._held.items()
        }

    def is_prepared(self, worker_id: str) -> bool:
        """Whether a worker lives and holds all that it should."""
        return worker_id in self._held and self._target(worker_id) <= self._usable(worker_id)

    def is_empty(self, worker_id: str) -> bool:
        """Whether a worker holds nothing, so that it can go."""
        return not self._held.get(worker_id) and worker_id not in self._loading

    # ---- events ----

    def set_placement(
        self,
        placement: Placement,
        shares: Shares | None = None,
        *,
        worker_phases: WorkerPhases | None = None,
    ) -> None:
        """What workers should hold from now on, and which share of an expert's rows each copy gets.

        Without `worker_phases` all workers take the rows of both phases.
        """
        self._home = {
            worker_id: frozenset(slot.place for slot in slots) for worker_id, slots in placement.items()
        }
        self._shares = shares or {}
        self._worker_phases = worker_phases or {}
        self._failed.clear()
        self._has_news = True

    def on_worker(self, worker_id: str, slots: Iterable[Slot], *, table_version: int) -> None:
        """A worker lives, and says what it holds and for which table it loaded it."""
        self._held[worker_id] = {slot.place: slot.slot_idx for slot in slots}
        self._loading.pop(worker_id, None)
        self._failed.discard(worker_id)
        self._has_news = True
        self.on_version_seen(table_version)

    def on_worker_lost(self, worker_id: str) -> None:
        """A worker's process is gone, and with it all that it held."""
        self._held.pop(worker_id, None)
        self._loading.pop(worker_id, None)
        self._has_news = True

    def on_loaded(self, order: LoadOrder) -> None:
        """A worker has carried an order out; says nothing when it was lost meanwhile."""
        if self._loading.get(order.worker_id) is order:
            del self._loading[order.worker_id]
            self._held[order.worker_id] = {slot.place: slot.slot_idx for slot in order.slots}
            self._has_news = True

    def on_load_failed(self, order: LoadOrder) -> None:
        """A worker could not carry an order out: it holds what it held before."""
        if self._loading.get(order.worker_id) is order:
            del self._loading[order.worker_id]
            self._failed.add(order.worker_id)
            self._has_news = True

    def retry(self, worker_id: str) -> None:
        """A worker may be given orders again after one that failed."""
        self._failed.discard(worker_id)

    def on_reader_started(self, member_id: str) -> None:
        """An attention worker runs: until it reports, it may use any table."""
        self._readers[member_id] = 0

    def on_reader(self, member_id: str, table_version: int) -> bool:
        """An attention worker says which table it uses; True when that is another one than before."""
        is_new = self._readers.get(member_id) != table_version
        self._readers[member_id] = table_version
        self.on_version_seen(table_version)
        return is_new

    def on_reader_lost(self, member_id: str) -> None:
        """An attention worker uses no table any more."""
        self._readers.pop(member_id, None)

    def on_version_seen(self, table_version: int) -> None:
        """Somebody has a table of an earlier controller: all that are made now get higher versions."""
        if table_version > self._version:
            epoch = table_version // _VERSIONS_OF_A_CONTROLLER + 1
            self._version = epoch * _VERSIONS_OF_A_CONTROLLER
            self._copies = {}
            self._has_news = True

    # ---- decisions ----

    def renew(self) -> bool:
        """Makes the table that fits what is held now; True when it is a new one to publish.

        While workers load, the table stays as it is, unless it names copies that are gone: then it is
        mended from whatever is held. Never while an expert would have no copy.
        """
        if not self._has_news:
            return False
        self._has_news = False
        self._renew_rescue()
        copies = self._plan_copies()
        phases = self._worker_phases if self.is_settled else self._table_phases
        if copies is None or (copies == self._copies and phases == self._table_phases):
            return False
        self._version += 1
        self._copies, self._table_phases = copies, phases
        self.table = build_routes(copies, self._shape, version=self._version, worker_phases=phases)
        named: dict[str, set[Place]] = {}
        for place, holders in copies.items():
            for copy in holders:
                named.setdefault(copy.worker_id, set()).add(place)
        self._named[self._version] = {worker: frozenset(places) for worker, places in named.items()}
        return True

    def plan_loads(self) -> list[LoadOrder]:
        """Orders to workers that hold something else than they should; under way from here on."""
        self._forget_old_tables()
        orders = []
        for worker_id in self._live():
            held = self._held[worker_id]
            wanted = self._target(worker_id) | self._kept(worker_id)
            if worker_id in self._loading or worker_id in self._failed or wanted == held.keys():
                continue
            order = LoadOrder(
                worker_id=worker_id,
                table_version=self.next_version,
                slots=number_slots(held, wanted),
                num_new=len(wanted - held.keys()),
            )
            self._loading[worker_id] = order
            self._has_news = True
            orders.append(order)
        return orders

    def check_integrity(self) -> None:
        """Nothing that a table in use names is being freed.

        Raises:
            RuntimeError: names the worker and the experts.
        """
        if self._is_any_reader_unknown():
            # A new one gets the newest table, but counts as using any until it has said so.
            return
        for worker_id in self._live():
            freed = self._kept(worker_id) - self._usable(worker_id)
            if freed:
                raise RuntimeError(f"{worker_id} frees {sorted(freed)}, which a table in use names")

    # ---- what follows from what is known ----

    def _live(self) -> list[str]:
        return sorted(self._held, key=lambda worker_id: (len(worker_id), worker_id))

    def _target(self, worker_id: str) -> frozenset[Place]:
        rescued = frozenset(place for place, taker in self._rescue.items() if taker == worker_id)
        return rescued | (self._home or {}).get(worker_id, frozenset())

    def _usable(self, worker_id: str) -> frozenset[Place]:
        """What a worker holds and is not about to let go."""
        held = frozenset(self._held.get(worker_id, ()))
        order = self._loading.get(worker_id)
        return held if order is None else held & frozenset(slot.place for slot in order.slots)

    def _kept(self, worker_id: str) -> frozenset[Place]:
        """What a worker holds that a table in use names, or may name."""
        held = frozenset(self._held[worker_id])
        if self._is_any_reader_unknown():
            return held
        return held & frozenset().union(*(named.get(worker_id, ()) for named in self._named.values()))

    def _is_any_reader_unknown(self) -> bool:
        """Whether somebody may use a table that this controller did not make."""
        return any(version not in self._named for version in self._readers.values())

    def _forget_old_tables(self) -> None:
        if self._named and not self._is_any_reader_unknown():
            oldest = min(self._readers.values(), default=max(self._named))
            self._named = {version: named for version, named in self._named.items() if version >= oldest}

    def _renew_rescue(self) -> None:
        """Rescued experts go home as soon as their home holds them; new orphans find a survivor."""
        usable = {worker_id: self._usable(worker_id) for worker_id in self._live()}
        home = self._home or {}
        at_home = frozenset().union(*(usable[worker] & home.get(worker, frozenset()) for worker in usable))
        self._rescue = {
            place: worker_id
            for place, worker_id in self._rescue.items()
            if worker_id in usable and worker_id in home and place not in at_home
        }
        if self._version == 0:
            # Nothing was lost yet: the workers are starting.
            return
        targets = {worker_id: self._target(worker_id) for worker_id in usable if worker_id in home}
        covered = frozenset().union(*usable.values(), *targets.values())
        orphans = [place for place in self._places if place not in covered]
        self._rescue.update(plan_rescue(orphans, targets))

    def _plan_copies(self) -> Copies | None:
        """The copies that the table should name; None when it stays as it is, or some expert has no copy."""
        usable = {worker_id: self._usable(worker_id) for worker_id in self._live()}
        targets = {worker_id: self._target(worker_id) & usable[worker_id] for worker_id in usable}
        current = {
            worker_id: self._named.get(self._version, {}).get(worker_id, frozenset()) & usable[worker_id]
            for worker_id in usable
        }
        if self.is_settled:
            choices = (targets, current, usable)
        elif self._copies and all(
            place in usable.get(copy.worker_id, ()) for place, held in self._copies.items() for copy in held
        ):
            return None
        else:
            choices = (current, targets, usable)
        by_choice = [_holders(choice) for choice in choices]
        holders = {
            place: next((found[place] for found in by_choice if place in found), ()) for place in self._places
        }
        if not all(holders.values()):
            return None
        slots = {worker_id: self._held[worker_id] for worker_id in usable}
        return weigh_copies(holders, slots=slots, shares=self._shares)


def _holders(places_of: Mapping[str, frozenset[Place]]) -> Mapping[Place, tuple[str, ...]]:
    holders: dict[Place, tuple[str, ...]] = {}
    for worker_id, places in places_of.items():
        for place in places:
            holders[place] = (*holders.get(place, ()), worker_id)
    return holders
