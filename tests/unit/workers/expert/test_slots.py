"""Expert slots: what is loaded, what is kept, what is refused, and that nothing is ever half done."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import CheckpointInvalid
from model.kernels.plain import TorchKernels
from model.matrix import Mlp, StoredMatrix
from workers.expert.slots import SlotStore
from workers.expert.types import Slot


def _mlp(full: torch.Tensor) -> Mlp:
    gate_up, down = StoredMatrix(values_FD=full), StoredMatrix(values_FD=full.T)
    return TorchKernels().pack_mlp(gate_up, gate_up, down, "float32")


class Loader:
    """Weights of 2 x 3 whose first value names layer and expert; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.broken: set[tuple[int, int]] = set()

    def __call__(self, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Mlp]]:
        for layer_idx, expert_idx in wanted:
            self.asked.append((layer_idx, expert_idx))
            if (layer_idx, expert_idx) in self.broken:
                raise CheckpointInvalid(f"experts.{expert_idx}", problem="missing")
            full = torch.full((2, 3), float(layer_idx * 100 + expert_idx))
            yield (layer_idx, expert_idx), _mlp(full)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def store(loader: Loader) -> SlotStore:
    return SlotStore(loader)


def test_new_store_is_empty(store: SlotStore) -> None:
    assert (store.slots(), store.table_version, store.num_bytes()) == ((), 0, 0)
    assert store.experts_of(1) == {}
    store.check_integrity()


def test_each_layers_experts_are_gathered_before_anyone_sees_them(loader: Loader) -> None:
    gathered: list[Mapping[int, Mlp]] = []

    def gather(experts: Mapping[int, Mlp]) -> Mapping[int, Mlp]:
        gathered.append(MappingProxyType(dict(experts)))
        return gathered[-1]

    store = SlotStore(loader, gather_experts=gather)
    store.prepare([Slot(1, 0, 5), Slot(1, 1, 6), Slot(2, 0, 5)], table_version=1)
    assert [set(experts) for experts in gathered] == [{5, 6}, {5}]
    assert store.experts_of(1) is gathered[0]
    assert store.experts_of(2) is gathered[1]


def test_what_is_held_is_kept_and_only_the_missing_loaded(store: SlotStore, loader: Loader) -> None:
    store.prepare([Slot(1, 0, 5), Slot(1, 1, 6), Slot(2, 0, 5)], table_version=1)
    kept = store.experts_of(1)[6]
    loader.asked.clear()
    store.prepare([Slot(1, 0, 6), Slot(1, 1, 7), Slot(2, 0, 5)], table_version=2)
    assert loader.asked == [(1, 7)]
    assert store.experts_of(1)[6] is kept
    assert set(store.experts_of(1)) == {6, 7}
    assert store.slots() == (Slot(1, 0, 6), Slot(1, 1, 7), Slot(2, 0, 5))
    assert store.table_version == 2


def test_mapping_that_a_reader_holds_does_not_change(store: SlotStore) -> None:
    store.prepare([Slot(1, 0, 5)], table_version=1)
    before = store.experts_of(1)
    store.prepare([Slot(1, 0, 6)], table_version=2)
    assert set(before) == {5}


def test_two_experts_in_one_slot_are_refused(store: SlotStore, loader: Loader) -> None:
    with pytest.raises(ValueError, match="2 assignments name one slot twice"):
        store.prepare([Slot(1, 0, 5), Slot(1, 0, 6)], table_version=1)
    assert (loader.asked, store.slots(), store.table_version) == ([], (), 0)


def test_same_slot_index_in_two_layers_is_two_slots(store: SlotStore) -> None:
    store.prepare([Slot(1, 0, 5), Slot(2, 0, 6)], table_version=1)
    assert [set(store.experts_of(layer)) for layer in (1, 2)] == [{5}, {6}]


def test_expert_in_two_slots_is_held_and_loaded_once(store: SlotStore, loader: Loader) -> None:
    store.prepare([Slot(1, 0, 5), Slot(1, 1, 5)], table_version=1)
    assert loader.asked == [(1, 5)]
    assert store.num_bytes() == 3 * 6 * 4
    store.check_integrity()


def test_failing_load_changes_nothing(store: SlotStore, loader: Loader) -> None:
    store.prepare([Slot(1, 0, 5)], table_version=1)
    loader.broken = {(1, 7)}
    with pytest.raises(CheckpointInvalid, match=r"experts\.7"):
        store.prepare([Slot(1, 0, 6), Slot(1, 1, 7)], table_version=2)
    assert (store.slots(), store.table_version, set(store.experts_of(1))) == ((Slot(1, 0, 5),), 1, {5})
    store.check_integrity()


def test_bytes_are_those_of_every_tensor(store: SlotStore) -> None:
    store.prepare([Slot(1, 0, 5), Slot(2, 0, 5)], table_version=1)
    assert store.num_bytes() == 2 * 3 * 6 * 4


@pytest.mark.parametrize(
    ("slots", "what"),
    [
        ((), r"slots name \[\] without weights, hold \[\(1, 5\)\]"),
        ((Slot(1, 0, 5), Slot(1, 1, 6)), r"\(1, 6\)"),
    ],
)
def test_integrity_check_names_the_difference(store: SlotStore, slots: tuple[Slot, ...], what: str) -> None:
    store.prepare([Slot(1, 0, 5)], table_version=1)
    store._slots = slots
    with pytest.raises(RuntimeError, match=what):
        store.check_integrity()


PLACES = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.integers(0, 4), max_size=6)


@given(rounds=st.lists(PLACES, min_size=1, max_size=4))
def test_any_sequence_of_placements_is_held_as_told(rounds: list[dict[tuple[int, int], int]]) -> None:
    loader = Loader()
    store = SlotStore(loader)
    held: set[tuple[int, int]] = set()
    for version, places in enumerate(rounds, 1):
        loader.asked.clear()
        slots = [Slot(layer, slot, expert) for (layer, slot), expert in places.items()]
        store.prepare(slots, table_version=version)
        wanted = {(slot.layer_idx, slot.expert_idx) for slot in slots}
        assert sorted(loader.asked) == sorted(wanted - held)
        assert store.slots() == tuple(sorted(slots))
        for layer_idx in range(3):
            experts = store.experts_of(layer_idx)
            got = {expert: int(weights.gate.stored.values_FD[0, 0]) for expert, weights in experts.items()}
            assert got == {expert: layer_idx * 100 + expert for layer, expert in wanted if layer == layer_idx}
        store.check_integrity()
        held = wanted


def test_missing_experts_are_loaded_on_demand_and_kept_apart(loader: Loader) -> None:
    store = SlotStore(loader, max_on_demand=4)
    store.prepare([Slot(1, 0, 5)], table_version=1)
    loader.asked.clear()
    found = store.load_missing(1, [5, 6, 7, 6])
    assert {expert: int(weights.gate.stored.values_FD[0, 0]) for expert, weights in found.items()} == {
        5: 105,
        6: 106,
        7: 107,
    }
    assert found[5] is store.experts_of(1)[5]
    assert loader.asked == [(1, 6), (1, 7)]
    assert store.load_missing(1, [7, 6])[6] is found[6]
    assert loader.asked == [(1, 6), (1, 7)]
    assert set(store.experts_of(1)) == {5}
    assert store.num_bytes() == 3 * 6 * 4
    store.check_integrity()


def test_experts_loaded_on_demand_are_bounded_and_the_oldest_go(loader: Loader) -> None:
    store = SlotStore(loader, max_on_demand=2)
    store.load_missing(1, [1, 2])
    store.load_missing(1, [1])
    assert set(store.load_missing(1, [3, 4, 5])) == {3, 4, 5}
    assert store.on_demand() == [(1, 4), (1, 5)]


def test_prepare_takes_what_was_loaded_on_demand(store: SlotStore, loader: Loader) -> None:
    store = SlotStore(loader, max_on_demand=2)
    loaded = store.load_missing(1, [6])[6]
    store.prepare([Slot(1, 0, 6), Slot(1, 1, 7)], table_version=1)
    assert loader.asked == [(1, 6), (1, 7)]
    assert store.experts_of(1)[6] is loaded
    assert store.on_demand() == []


def test_expert_on_its_way_into_a_slot_is_not_loaded_twice(loader: Loader) -> None:
    seen: list[Mlp] = []

    def load(wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Mlp]]:
        for place, weights in loader(wanted):
            yield place, weights
            if len(wanted) > 1:  # the first of two is in memory, the slots are not published yet
                seen.append(store.load_missing(1, [6])[6])

    store = SlotStore(load, max_on_demand=2)
    store.prepare([Slot(1, 0, 6), Slot(1, 1, 7)], table_version=1)
    assert loader.asked == [(1, 6), (1, 7)]
    assert seen[0] is seen[1] is store.experts_of(1)[6]


def test_load_on_demand_that_fails_keeps_nothing(loader: Loader) -> None:
    store = SlotStore(loader, max_on_demand=2)
    loader.broken = {(1, 7)}
    with pytest.raises(CheckpointInvalid, match=r"experts\.7"):
        store.load_missing(1, [7])
    assert store.on_demand() == []


@given(
    asked=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=8), bound=st.integers(1, 4)
)
def test_any_sequence_of_demands_gets_its_experts_within_the_bound(
    asked: list[list[int]], bound: int
) -> None:
    store = SlotStore(Loader(), max_on_demand=bound)
    for experts in asked:
        found = store.load_missing(2, experts)
        assert {e: int(w.gate.stored.values_FD[0, 0]) for e, w in found.items()} == {
            e: 200 + e for e in experts
        }
        assert len(store.on_demand()) <= bound
