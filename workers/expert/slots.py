"""Expert slots: which experts' weights this worker holds, layer by layer."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from model.matrix import Mlp
from workers.expert.types import Slot

Place = tuple[int, int]
"""(layer_idx, expert_idx)."""
LoadExperts = Callable[[Sequence[Place]], Iterable[tuple[Place, Mlp]]]
"""Reads the experts named from the checkpoint."""


class SlotStore:
    """The weights that a worker holds.

    `prepare` is called by one thread at a time; `experts_of` by the arithmetic thread at any moment: it sees
    the old contents or the new, never a mixture, because a layer's mapping is replaced and never written to.
    """

    def __init__(self, load_experts: LoadExperts) -> None:
        self._load_experts = load_experts
        self._lock = threading.Lock()
        self._slots: tuple[Slot, ...] = ()
        self._layers: Mapping[int, Mapping[int, Mlp]] = {}
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
        for layer_idx, expert_idx in sorted({(slot.layer_idx, slot.expert_idx) for slot in slots}):
            experts = layers.setdefault(layer_idx, {})
            held = self._layers.get(layer_idx, {}).get(expert_idx)
            if held is None:
                missing.append((layer_idx, expert_idx))
            else:
                experts[expert_idx] = held
        for (layer_idx, expert_idx), weights in self._load_experts(missing):
            layers[layer_idx][expert_idx] = weights
        with self._lock:
            self._layers = layers
            self._slots = tuple(sorted(slots))
            self.table_version = table_version

    def experts_of(self, layer_idx: int) -> Mapping[int, Mlp]:
        """Expert index -> weights of one layer; empty when the worker holds none of it."""
        return self._layers.get(layer_idx, {})

    def slots(self) -> tuple[Slot, ...]:
        """What is held, in order."""
        with self._lock:
            return self._slots

    def num_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(weights.num_bytes for experts in self._layers.values() for weights in experts.values())

    def check_integrity(self) -> None:
        """Slots and weights tell the same story.

        Raises:
            RuntimeError: an expert is held without a slot, or a slot without its expert.
        """
        with self._lock:
            named = {(slot.layer_idx, slot.expert_idx) for slot in self._slots}
            held = {(layer, expert) for layer, experts in self._layers.items() for expert in experts}
        if named != held:
            raise RuntimeError(
                f"slots name {sorted(named - held)} without weights, hold {sorted(held - named)}"
            )
