"""What a placement and an expert worker both speak of; loads without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Slot:
    """One place for one expert's weights."""

    layer_idx: int
    slot_idx: int
    expert_idx: int
