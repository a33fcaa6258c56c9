"""Expert slots: which experts' weights this worker holds, layer by layer."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from model.matrix import Mlp
from workers.expert.on_demand import OnDemandExperts
from workers.expert.types import Place, Slot

LoadExperts = Callable[[Sequence[Place]], Iterable[tuple[Place, Mlp]]]
"""Reads the experts named from the checkpoint."""
GatherExperts = Callable[[Mapping[int, Mlp]], Mapping[int, Mlp]]
"""Makes the experts of one layer ready for the kernels."""


class SlotStore:
    """The weights that a worker holds.

    `prepare` is called by one thread at a time; `experts_of` and `load_missing` by others at any moment: they
    see the old contents or the new, never a mixture, because a layer's mapping is replaced, never written to.
    """

    def __init__(
        self, load_experts: LoadExperts, *, gather_experts: GatherExperts = dict, max_on_demand: int = 0
    ) -> None:
        """Makes an empty one.

        Args:
            load_experts: reads weights.
            gather_experts: makes each layer's ready, once.
            max_on_demand: experts outside the slots that `load_missing` keeps, >= 0.
        """
        self._load_experts = load_experts
        self._gather_experts = gather_experts
        self._on_demand = OnDemandExperts(max_on_demand)
        self._lock = threading.Lock()
        self._slots: tuple[Slot, ...] = ()
        self._layers: Mapping[int, Mapping[int, Mlp]] = {}
        self._arriving: dict[Place, Mlp] = {}
        """Written by `prepare` while it loads, read by `load_missing`."""
        self.table_version = 0
        """Newest routing table that every slot was loaded for; 0 = none."""

    def prepare(self, slots: Sequence[Slot], *, table_version: int) -> None:
        """Holds exactly `slots`: loads what is missing, keeps what is there, lets go of the rest.

        Raises:
            ValueError: two experts in one slot.
            CheckpointInvalid: an expert's tensor is missing or misshapen; nothing has changed then.
        """
        if len({(slot.layer_idx, slot.slot_idx) for slot in slots}) != len(slots):
            raise ValueError(f"{len(slots)} assignments name one slot twice")
        layers: dict[int, dict[int, Mlp]] = {}
        missing: list[Place] = []
        for layer_idx, expert_idx in sorted({slot.place for slot in slots}):
            held = self._find((layer_idx, expert_idx))
            experts = layers.setdefault(layer_idx, {})
            if held is None:
                missing.append((layer_idx, expert_idx))
            else:
                experts[expert_idx] = held
        try:
            for (layer_idx, expert_idx), weights in self._load_experts(missing):
                layers[layer_idx][expert_idx] = self._arriving[layer_idx, expert_idx] = weights
            gathered = {layer_idx: self._gather_experts(experts) for layer_idx, experts in layers.items()}
            with self._lock:
                self._layers = gathered
                self._slots = tuple(sorted(slots))
                self.table_version = table_version
        finally:
            self._arriving = {}
        for slot in slots:
            self._on_demand.drop(slot.place)

    def experts_of(self, layer_idx: int) -> Mapping[int, Mlp]:
        """Expert index -> weights of one layer; empty when the worker holds none of it."""
        return self._layers.get(layer_idx, {})

    def load_missing(self, layer_idx: int, expert_ids: Sequence[int]) -> Mapping[int, Mlp]:
        """Expert index -> weights of exactly `expert_ids`; loads on the calling thread what no slot holds.

        What had to be loaded is kept apart from the slots, up to the bound, the newest ones.

        Raises:
            CheckpointInvalid: an expert's tensor is missing or misshapen.
        """
        found = {expert: self._find((layer_idx, expert)) for expert in dict.fromkeys(expert_ids)}
        missing = [(layer_idx, expert) for expert, weights in found.items() if weights is None]
        if missing:
            for place, weights in self._load_experts(missing):
                found[place[1]] = weights
                self._on_demand.keep(place, weights)
        return {expert: weights for expert, weights in found.items() if weights is not None}

    def slots(self) -> tuple[Slot, ...]:
        """What is held, in order."""
        with self._lock:
            return self._slots

    def on_demand(self) -> list[Place]:
        """What is held outside the slots, oldest first."""
        return self._on_demand.places()

    def num_bytes(self) -> int:
        """Bytes of all weights in slots."""
        return sum(weights.num_bytes for experts in self._layers.values() for weights in experts.values())

    def check_integrity(self) -> None:
        """Slots and weights tell the same story.

        Raises:
            RuntimeError: an expert is held without a slot, or a slot without its expert.
        """
        with self._lock:
            named = {slot.place for slot in self._slots}
            held = {(layer, expert) for layer, experts in self._layers.items() for expert in experts}
        if named != held:
            raise RuntimeError(
                f"slots name {sorted(named - held)} without weights, hold {sorted(held - named)}"
            )

    def _find(self, place: Place) -> Mlp | None:
        """Weights that are in memory already: in a slot, on their way into one, or loaded on demand."""
        layer_idx, expert_idx = place
        held = self._layers.get(layer_idx, {}).get(expert_idx, self._arriving.get(place))
        return self._on_demand.find(place) if held is None else held
