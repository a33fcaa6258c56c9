"""Expert slots: which experts' weights this worker holds, layer by layer."""

import threading
from collections.abc import Callable, Mapping, Sequence

from model.weights import ExpertWeights
from workers.expert.types import Slot

LoadExpert = Callable[[int, int], ExpertWeights]
"""(layer_idx, expert_idx) -> the weights, read from the checkpoint."""


class SlotStore:
    """The weights that a worker holds.

    `prepare` is called by one thread at a time; `experts_of` by the arithmetic thread at any moment: it sees
    the old contents or the new, never a mixture, because a layer's mapping is replaced and never written to.
    """

    def __init__(self, load_expert: LoadExpert) -> None:
        self._load_expert = load_expert
        self._lock = threading.Lock()
        self._slots: tuple[Slot, ...] = ()
        self._layers: Mapping[int, Mapping[int, ExpertWeights]] = {}
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
        layers: dict[int, dict[int, ExpertWeights]] = {}
        for slot in slots:
            experts = layers.setdefault(slot.layer_idx, {})
            if slot.expert_idx not in experts:
                held = self._layers.get(slot.layer_idx, {}).get(slot.expert_idx)
                experts[slot.expert_idx] = held or self._load_expert(slot.layer_idx, slot.expert_idx)
        with self._lock:
            self._layers = layers
            self._slots = tuple(sorted(slots))
            self.table_version = table_version

    def experts_of(self, layer_idx: int) -> Mapping[int, ExpertWeights]:
        """Expert index -> weights of one layer; empty when the worker holds none of it."""
        return self._layers.get(layer_idx, {})

    def slots(self) -> tuple[Slot, ...]:
        """What is held, in order."""
        with self._lock:
            return self._slots

    def num_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(
            tensor.numel() * tensor.element_size()
            for experts in self._layers.values()
            for weights in experts.values()
            for tensor in (weights.gate_FD, weights.up_FD, weights.down_DF)
        )

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
