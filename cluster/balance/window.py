"""How many rows every expert got lately: counts that fade with time, apart for prefill and decode.

Worked example, half-life 10 s: 100 rows counted at 0 s are worth 50 at 10 s; with 30 more counted then the
window holds 80, and 40 at 20 s. Dividing by the rows of all experts gives the mix of the last half-lives,
whatever the traffic.

Letters: E logical experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from cluster.balance.types import Floats
from wire.phases import PHASES, Phase

Loads = Mapping[int, Floats]
"""MoE layer index -> (E,) rows of each expert."""
PhaseLoads = Mapping[Phase, Loads]
NOTHING: PhaseLoads = MappingProxyType({phase: MappingProxyType({}) for phase in PHASES})


@dataclass(frozen=True, kw_only=True)
class LoadWindow:
    """Decayed row counts; `fold` gives the next window and leaves this one as it is."""

    half_life_s: float
    """> 0; after so long without rows a count is worth half."""
    as_of_s: float = 0.0
    """When the counts were last decayed."""
    counts: PhaseLoads = field(default_factory=lambda: NOTHING)

    def fold(self, phase: Phase, rows: Loads, *, now_s: float) -> "LoadWindow":
        """The window with more rows in it.

        Args:
            phase: what the rows were computed for.
            rows: MoE layer index -> (E,) rows of each expert since the last fold, >= 0.
            now_s: the time on the clock of the earlier folds; one before the last fold counts as the last.
        """
        decayed = self._at(now_s)
        folded = dict(decayed.counts[phase])
        for layer_idx, rows_E in rows.items():
            folded[layer_idx] = folded.get(layer_idx, 0.0) + np.asarray(rows_E, np.float64)
        return replace(decayed, counts=MappingProxyType({**decayed.counts, phase: MappingProxyType(folded)}))

    def by_phase(self, *, now_s: float) -> PhaseLoads:
        """Phase -> MoE layer index -> (E,) decayed rows."""
        return self._at(now_s).counts

    def loads(self, *phases: Phase, now_s: float) -> Loads:
        """MoE layer index -> (E,) decayed rows of some phases together; of all phases when none is named."""
        counts = self.by_phase(now_s=now_s)
        return total_of({phase: counts[phase] for phase in phases or PHASES})

    def num_rows(self, *phases: Phase, now_s: float) -> float:
        """Decayed rows of all layers and experts: how much the window has seen."""
        return float(sum(rows_E.sum() for rows_E in self.loads(*phases, now_s=now_s).values()))

    def _at(self, now_s: float) -> "LoadWindow":
        age_s = max(now_s - self.as_of_s, 0.0)
        part = 0.5 ** (age_s / self.half_life_s)
        counts = {
            phase: MappingProxyType({layer_idx: rows_E * part for layer_idx, rows_E in loads.items()})
            for phase, loads in self.counts.items()
        }
        return replace(self, as_of_s=self.as_of_s + age_s, counts=MappingProxyType(counts))


def total_of(loads: PhaseLoads) -> Loads:
    """MoE layer index -> (E,) rows of all phases together."""
    total: dict[int, Floats] = {}
    for of_phase in loads.values():
        for layer_idx, rows_E in of_phase.items():
            total[layer_idx] = total.get(layer_idx, 0.0) + rows_E
    return MappingProxyType(dict(sorted(total.items())))
