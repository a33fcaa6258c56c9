"""Load counters: rows by phase, layer and expert since somebody last asked, and how even they were."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wire.phases import PHASES, Phase
from workers.expert.types import Place

Ints = npt.NDArray[np.int64]
_FADED_ROWS = 0.01


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """How a number of rows spreads over the experts that a worker holds."""

    balance: float
    """Mean over most rows of an expert, (0, 1]; 1 without rows."""
    gini: float
    """0 = every expert has the same rows, towards 1 = one has all."""
    top_rows: tuple[int, ...]
    """Rows of the busiest experts, most first."""


class LoadCounters:
    """Counts rows; `count` is called by the arithmetic thread, `drain` by the network's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = _no_rows()

    def count(self, phase: Phase, layer_idx: int, expert_idx_A: npt.NDArray[np.integer]) -> None:
        """Counts one row for every entry.

        Args:
            phase: what they were computed for.
            layer_idx: MoE layer.
            expert_idx_A: (A,) logical experts, >= 0.
        """
        if not expert_idx_A.size:
            return
        rows = np.bincount(expert_idx_A)
        with self._lock:
            rows_by_layer = self._rows[phase]
            before = rows_by_layer.get(layer_idx)
            if before is None or len(before) < len(rows):
                grown = np.zeros(len(rows), dtype=np.int64)
                grown[: 0 if before is None else len(before)] = 0 if before is None else before
                before = rows_by_layer[layer_idx] = grown
            before[: len(rows)] += rows

    def drain(self) -> Mapping[Phase, Mapping[int, Ints]]:
        """Phase -> layer -> (E',) rows by expert, up to the last one that had any, since the last call."""
        with self._lock:
            rows, self._rows = self._rows, _no_rows()
        return rows


def _no_rows() -> dict[Phase, dict[int, Ints]]:
    return {phase: {} for phase in PHASES}


class RecentLoad:
    """Rows of late by place: older ones fade. One thread uses it.

    Worked example, half-life 10 s: 8 rows at 0 s and 1 row at 10 s are 8 / 2 + 1 = 5 rows at 10 s.
    """

    def __init__(self, *, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._as_of_s = 0.0
        self._rows: dict[Place, float] = {}

    def fold(self, rows_by_layer: Mapping[int, Ints], *, now_s: float) -> None:
        """Counts more rows, at a time on the clock of the calls before."""
        part = 0.5 ** (max(0.0, now_s - self._as_of_s) / self._half_life_s)
        self._as_of_s = now_s
        self._rows = {place: rows * part for place, rows in self._rows.items() if rows * part > _FADED_ROWS}
        for layer_idx, rows_E in rows_by_layer.items():
            for expert_idx in np.flatnonzero(rows_E).tolist():
                place = (layer_idx, expert_idx)
                self._rows[place] = self._rows.get(place, 0.0) + int(rows_E[expert_idx])

    def rows_of(self, places: Iterable[Place]) -> list[float]:
        """The rows of these places."""
        return [self._rows.get(place, 0.0) for place in places]


def summarise(rows_E: Sequence[float] | Ints, *, num_top: int) -> LoadSummary:
    """How even the rows of experts are.

    Worked example: rows 6, 2, 0, 0 have mean 2, so balance 2 / 6, and a Gini coefficient of 0.625.

    Source: Gini over sorted values, G = sum((2i - n - 1) x_i) / (n sum(x)), i from 1.
    """
    sorted_E = np.sort(np.asarray(rows_E, dtype=np.float64))
    total = float(sorted_E.sum())
    top = tuple(int(rows) for rows in sorted_E[::-1][:num_top])
    if total == 0:
        return LoadSummary(balance=1.0, gini=0.0, top_rows=top)
    num = len(sorted_E)
    rank_E = 2 * np.arange(1, num + 1) - num - 1
    return LoadSummary(
        balance=total / num / float(sorted_E[-1]),
        gini=float((rank_E * sorted_E).sum()) / (num * total),
        top_rows=top,
    )
