"""Random tables, random choices and a plain reference, for the tests of the expert side of the router."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from router.experts.plan import WorkerCall
from router.experts.replicas import WorkerLoads
from router.experts.table import Replica, RoutingTable, build_table
from wire.phases import PHASES

HIDDEN = 5
LAYER = 3


def copies(expert_idx: int, workers: list[int], weights: list[int]) -> list[Replica]:
    """The replicas of one expert, its rows shared in proportion to `weights`."""
    return [
        Replica(expert_idx=expert_idx, worker_idx=worker, slot_idx=expert_idx, share=weight / sum(weights))
        for worker, weight in zip(workers, weights, strict=True)
    ]


@st.composite
def tables(draw: st.DrawFn, *, num_experts: int, version: int = 1, is_by_phase: bool = False) -> RoutingTable:
    """Any number of workers, any placement, any shares, and by phase any worker for any."""
    num_workers = draw(st.integers(1, 4))
    phases = draw(st.lists(st.sampled_from([*PHASES, None]), min_size=num_workers, max_size=num_workers))
    replicas = []
    for expert_idx in range(num_experts):
        workers = draw(st.lists(st.integers(0, num_workers - 1), min_size=1, max_size=3, unique=True))
        replicas += copies(expert_idx, workers, [draw(st.integers(1, 5)) for _ in workers])
    return build_table(
        version=version,
        num_experts=num_experts,
        worker_ids=[f"expert-{i}" for i in range(num_workers)],
        layers={LAYER: replicas},
        worker_phases={f"expert-{i}": phase for i, phase in enumerate(phases) if is_by_phase and phase},
    )


def loads_of(
    *, backlog: Sequence[float], cost: Sequence[float] = (), is_usable: Sequence[bool] = ()
) -> WorkerLoads:
    """Loads of as many workers as there are backlogs; by default all are usable and as quick as another."""
    return WorkerLoads(
        is_usable_W=is_usable or [True] * len(backlog),
        backlog_W=backlog,
        row_cost_W=cost or [1.0] * len(backlog),
    )


def usable_loads(num_workers: int = 4) -> st.SearchStrategy[WorkerLoads]:
    """Any backlog and cost, and any workers usable, even none."""

    def of_each(strategy: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(strategy, min_size=num_workers, max_size=num_workers)

    return st.builds(
        lambda backlog, cost, is_usable: loads_of(backlog=backlog, cost=cost, is_usable=is_usable),
        of_each(st.integers(0, 100)),
        of_each(st.floats(1, 9)),
        of_each(st.booleans()),
    )


@dataclass(frozen=True)
class Choices:
    """What a gate chose for a batch."""

    num_experts: int
    x_TD: np.ndarray
    ids_TK: np.ndarray
    weights_TK: np.ndarray

    def pairs(self) -> list[tuple[int, int, np.float32]]:
        """(token, expert, weight) of every choice."""
        return [
            (token, int(expert), self.weights_TK[token, k])
            for token, ids_K in enumerate(self.ids_TK)
            for k, expert in enumerate(ids_K)
            if expert >= 0
        ]


def random_choices(num_tokens: int, *, num_experts: int = 6, top_k: int = 3, seed: int = 0) -> Choices:
    """Distinct experts for every token, one choice in eight left out (-1)."""
    rng = np.random.default_rng(seed)
    ids_TK = np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)], dtype=np.int32)
    ids_TK = ids_TK.reshape(num_tokens, top_k)
    ids_TK[rng.random(ids_TK.shape) < 1 / 8] = -1
    return Choices(
        num_experts=num_experts,
        x_TD=rng.standard_normal((num_tokens, HIDDEN), dtype=np.float32),
        ids_TK=ids_TK,
        weights_TK=rng.random((num_tokens, top_k), dtype=np.float32),
    )


def choices(*, num_experts: int = 6, max_tokens: int = 20) -> st.SearchStrategy[Choices]:
    return st.builds(
        lambda num_tokens, top_k, seed: random_choices(
            num_tokens, num_experts=num_experts, top_k=top_k, seed=seed
        ),
        st.integers(0, max_tokens),
        st.integers(1, num_experts),
        st.integers(0, 2**31),
    )


def expert_output(expert_idx: int, x_D: np.ndarray, weight: np.float32) -> np.ndarray:
    """A stand-in for an expert: (D,) float32, weighted and rounded once."""
    return ((x_D * np.float32(expert_idx + 0.37)).clip(-1.5, 1.5) * weight).astype(np.float32)


def partial_sums(x_RD: np.ndarray, call: WorkerCall) -> np.ndarray:
    """What an expert worker answers: (R, D) float64."""
    sums_RD = np.zeros(x_RD.shape)
    for row, expert, weight in zip(call.row_idx_A, call.expert_idx_A, call.weight_A, strict=True):
        sums_RD[row] += expert_output(int(expert), x_RD[row], weight)
    return sums_RD


def plain_combine(given: Choices) -> np.ndarray:
    """The plain reference: a loop over all pairs in FP64, rounded once to (T, D) float32."""
    total_TD = np.zeros(given.x_TD.shape)
    for token, expert, weight in given.pairs():
        total_TD[token] += expert_output(expert, given.x_TD[token], weight)
    return total_TD.astype(np.float32)
