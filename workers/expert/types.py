"""What a placement and an expert worker both speak of; loads without torch."""

from dataclasses import dataclass

Place = tuple[int, int]
"""(layer_idx, expert_idx)."""


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
