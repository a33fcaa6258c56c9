"""Which worker and which failure domain holds copies of which expert, kept up to date while a plan is made.

Letters: L layers, E logical experts, W workers, X slots of one worker in one layer, Z failure domains, R
rows here: the layers that a call is about.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.balance.types import EMPTY, Fleet, Floats, Ints

TWICE = 1e9
"""Handicap of a worker that holds the expert already; loads are about 1."""
SAME_DOMAIN = 1e6
"""Handicap of a worker in whose failure domain the expert has a replica."""


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

    def handicaps(self, layer_R: Ints, expert_R: Ints) -> Floats:
        """(R, W) what speaks against each worker as the next home of an expert, 0 for nothing."""
        is_held_RW = self.by_worker_LEW[layer_R, expert_R] > 0
        near_RW = self.by_domain_LEZ[layer_R, expert_R][:, self.fleet.domain_W]
        handicap_RW: Floats = TWICE * is_held_RW + SAME_DOMAIN * near_RW
        return handicap_RW
