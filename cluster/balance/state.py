"""Which worker and which failure domain holds copies of which expert, kept up to date while a plan is made.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, Z failure domains, R
rows here: the layers that a call is about.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.balance.types import EMPTY, Fleet, Ints


@dataclass(frozen=True)
class Copies:
    """Counts of copies; one plan owns and changes it."""

    fleet: Fleet
    by_worker_LEW: npt.NDArray[np.int16]
    by_domain_LEZ: npt.NDArray[np.int16]

    @classmethod
    def of(cls, plan_LWX: Ints, fleet: Fleet, *, num_experts: int) -> "Copies":
        """The copies of a plan."""
        num_layers = len(plan_LWX)
        copies = cls(
            fleet,
            np.zeros((num_layers, num_experts, fleet.num_workers), dtype=np.int16),
            np.zeros((num_layers, num_experts, fleet.num_domains), dtype=np.int16),
        )
        layer_A, worker_A, slot_A = np.nonzero(plan_LWX != EMPTY)
        copies.add(layer_A, worker_A, plan_LWX[layer_A, worker_A, slot_A])
        return copies

    def add(self, layer_A: Ints, worker_A: Ints, expert_A: Ints) -> None:
        """Counts one more copy of each."""
        np.add.at(self.by_worker_LEW, (layer_A, expert_A, worker_A), 1)
        np.add.at(self.by_domain_LEZ, (layer_A, expert_A, self.fleet.domain_W[worker_A]), 1)

    def replace(self, layer_A: Ints, worker_A: Ints, old_A: Ints, new_A: Ints) -> None:
        """Counts a copy of another expert in the place of each old one."""
        domain_A = self.fleet.domain_W[worker_A]
        np.add.at(self.by_worker_LEW, (layer_A, old_A, worker_A), -1)
        np.add.at(self.by_domain_LEZ, (layer_A, old_A, domain_A), -1)
        self.add(layer_A, worker_A, new_A)
