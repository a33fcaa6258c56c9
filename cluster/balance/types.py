"""What a balancing plan speaks of: arrays of experts by slot, and the workers that they are spread over.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, Z failure domains.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EMPTY = -1
"""In a slot that holds no expert."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The workers that a layer is spread over; all have the same number of slots."""

    num_slots: int
    """Slots of each worker in each layer (X)."""
    domain_W: Ints
    """(W,) failure domain of each worker, numbered from 0: what fails together has one number."""

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self.domain_W)

    @property
    def num_domains(self) -> int:
        """Z."""
        return int(self.domain_W.max()) + 1
