"""What a placement and an expert worker both speak of; loads without torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wire.frames import Frame
from wire.proto import expert_pb2

Place = tuple[int, int]
"""(layer_idx, expert_idx)."""
Reply = Callable[[int, Frame], None]
"""Gets the index of a frame among those that were asked together, and its answer."""


@dataclass(frozen=True, order=True)
class Slot:
    """One place for one expert's weights."""

    layer_idx: int
    slot_idx: int
    expert_idx: int

    @property
    def place(self) -> Place:
        """What it holds."""
        return (self.layer_idx, self.expert_idx)


def slots_to_proto(slots: Iterable[Slot]) -> list[expert_pb2.SlotAssignment]:
    """Slots as they travel."""
    return [
        expert_pb2.SlotAssignment(layer_idx=s.layer_idx, slot_idx=s.slot_idx, expert_idx=s.expert_idx)
        for s in slots
    ]


def slots_from_proto(items: Iterable[expert_pb2.SlotAssignment]) -> list[Slot]:
    """The slots of a message."""
    return [Slot(item.layer_idx, item.slot_idx, item.expert_idx) for item in items]
