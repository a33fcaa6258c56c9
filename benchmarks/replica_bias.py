"""How level each way to choose among the copies of experts makes the workers, and how long it takes.

    .venv/bin/python benchmarks/replica_bias.py [--rounds N] [--json]

A simulation of one layer: experts as popular as Zipf's law says, placed by Moray's balancer. Every batch is
drawn from that popularity with noise that the balancer did not see, and finds rows of others that wait at the
workers. Figures are means over the batches: the most that a worker has to do over the mean of all workers; 1
is perfect, which experts of one copy forbid. All ways see the same batches.

E experts, W workers, X slots of a worker, T rows, K choices of a row, A assignments (row, expert).
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from cluster.balance.homes import plan_homes
from cluster.balance.shares import plan_shares
from cluster.balance.types import Fleet
from router.experts.replicas import WorkerLoads, choose_replicas
from router.experts.table import Ints, LayerRoutes, Replica, build_table

Floats = npt.NDArray[np.float64]

SEED = 0
TOP_K = 8
ZIPF_EXPONENT = 0.8
NOISE = 0.5
"""Standard deviation of the logarithm of what a batch's popularity is multiplied with."""
BACKLOG = 0.3
"""Mean of the rows that wait at a worker, over what this batch brings it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size."""

    num_experts: int
    num_workers: int
    num_slots: int
    """Of one worker."""
    num_rows: int


CASES = (
    Case(num_experts=64, num_workers=2, num_slots=48, num_rows=32),
    Case(num_experts=64, num_workers=8, num_slots=12, num_rows=32),
    Case(num_experts=64, num_workers=8, num_slots=12, num_rows=512),
    Case(num_experts=256, num_workers=16, num_slots=20, num_rows=64),
    Case(num_experts=256, num_workers=32, num_slots=10, num_rows=64),
    Case(num_experts=256, num_workers=32, num_slots=10, num_rows=4096),
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a dispatch has to place."""

    expert_idx_A: Ints
    token_idx_A: Ints
    loads: WorkerLoads


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way at one size."""

    case: Case
    way: str
    max_over_mean: float
    plan_us: float
    """Median."""


def place(case: Case, popularity_E: Floats) -> LayerRoutes:
    """The experts where the balancer puts them, with its shares."""
    fleet = Fleet(num_slots=case.num_slots, domain_W=np.arange(case.num_workers))
    loads_LE = popularity_E[None]
    plan_LWX = plan_homes(loads_LE, fleet)
    share_LWX = plan_shares(loads_LE, plan_LWX)
    replicas = [
        Replica(expert_idx=int(expert), worker_idx=at[0], slot_idx=at[1], share=float(share_LWX[0][at]))
        for at, expert in np.ndenumerate(plan_LWX[0])
        if expert >= 0
    ]
    workers = [f"w{i}" for i in range(case.num_workers)]
    table = build_table(version=1, num_experts=case.num_experts, worker_ids=workers, layers={0: replicas})
    return table.routes(0)


def draw_batch(case: Case, popularity_E: Floats, rng: np.random.Generator) -> Batch:
    """Rows that choose different experts each, as popular as before but for the noise."""
    noisy_E = np.log(popularity_E) + rng.normal(0.0, NOISE, case.num_experts)
    # The K largest of logarithms with Gumbel noise are a draw without replacement.
    keys_TE = noisy_E + rng.gumbel(size=(case.num_rows, case.num_experts))
    ids_TK = np.argpartition(-keys_TE, TOP_K, axis=1)[:, :TOP_K]
    mean_rows = case.num_rows * TOP_K / case.num_workers
    return Batch(
        expert_idx_A=ids_TK.reshape(-1).astype(np.int64),
        token_idx_A=np.repeat(np.arange(case.num_rows, dtype=np.int64), TOP_K),
        loads=WorkerLoads(
            is_usable_W=[True] * case.num_workers,
            backlog_W=np.rint(rng.exponential(mean_rows * BACKLOG, case.num_workers)).tolist(),
            row_cost_W=[1.0] * case.num_workers,
        ),
    )


def by_shares(routes: LayerRoutes, batch: Batch) -> Ints:
    """The copy that the table's shares choose for each row, whatever waits there."""
    choices = zip(batch.expert_idx_A.tolist(), batch.token_idx_A.tolist(), strict=True)
    return np.array([routes.copies_of(expert, row_idx=token)[0] for expert, token in choices])


def by_two_choices(routes: LayerRoutes, batch: Batch) -> Ints:
    """Row by row, the copy with less to do of two different random ones."""
    rng = np.random.default_rng(SEED)
    level = list(batch.loads.backlog_W)
    draws = rng.random((len(batch.expert_idx_A), 2)).tolist()
    counts, copies = list(map(len, routes.copies_E)), routes.worker_EM.tolist()
    worker_A = []
    for expert, (first, second) in zip(batch.expert_idx_A.tolist(), draws, strict=True):
        count = counts[expert]
        one = int(first * count)
        other = (one + 1 + int(second * (count - 1))) % count
        worker = min(copies[expert][one], copies[expert][other], key=level.__getitem__)
        level[worker] += 1
        worker_A.append(worker)
    return np.array(worker_A)


def by_filling(routes: LayerRoutes, batch: Batch) -> Ints:
    """As Moray's dispatcher does."""
    choice = choose_replicas(routes, batch.expert_idx_A, batch.token_idx_A, batch.loads)
    return choice.worker_A.astype(np.int64)


WAYS: tuple[tuple[str, Callable[[LayerRoutes, Batch], Ints]], ...] = (
    ("shares alone", by_shares),
    ("better of two copies", by_two_choices),
    ("water-filling", by_filling),
)


def max_over_mean(worker_A: Ints, backlog_W: Sequence[float]) -> float:
    """The most that a worker has to do, over the mean."""
    level_W = np.array(backlog_W) + np.bincount(worker_A, minlength=len(backlog_W))
    return float(level_W.max() / level_W.mean())


def simulate(case: Case, *, num_rounds: int) -> list[Result]:
    """Every way over the same batches."""
    rng = np.random.default_rng(SEED)
    popularity_E = rng.permutation(np.arange(1.0, case.num_experts + 1) ** -ZIPF_EXPONENT)
    routes = place(case, popularity_E)
    batches = [draw_batch(case, popularity_E, rng) for _ in range(num_rounds)]
    results = []
    for name, choose in WAYS:
        ratios, spent_us = [], []
        for batch in batches:
            began_s = time.perf_counter()
            worker_A = choose(routes, batch)
            spent_us.append((time.perf_counter() - began_s) * 1e6)
            ratios.append(max_over_mean(worker_A, batch.loads.backlog_W))
        mean, median_us = statistics.mean(ratios), statistics.median(spent_us)
        results.append(Result(case=case, way=name, max_over_mean=mean, plan_us=median_us))
    return results


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each size.")] = 40,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Simulates every size and prints how level the workers are and what a plan takes."""
    results = [result for case in CASES for result in simulate(case, num_rounds=rounds)]
    machine = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    if as_json:
        report = {"machine": machine, "cpus": os.cpu_count(), "seed": SEED, "rounds": rounds}
        print(json.dumps(report | {"results": [asdict(result) for result in results]}))
        return
    table = Table(
        "experts / workers x slots", "rows", *(name for name, _ in WAYS), title="max / mean, us a plan"
    )
    for case in CASES:
        mine = [result for result in results if result.case == case]
        cells = [f"{result.max_over_mean:.3f}, {result.plan_us:,.0f} us" for result in mine]
        size = f"{case.num_experts} / {case.num_workers} x {case.num_slots}"
        table.add_row(size, str(case.num_rows), *cells)
    Console().print(table)
    print(f"{machine}; {rounds} batches of each size, seed {SEED}; the first two ways are plain loops")


if __name__ == "__main__":
    typer.run(main)
