"""Balances the load while the cluster runs: counts rows, looks now and then, moves what is worth it.

A move is a row of placements, each within a byte budget and each carried out as any placement is: loaded in
the background, published, and only then are old copies freed. A load that fails takes the move back to
where it was; no token waits for any of it.
"""

import asyncio
import contextlib
import logging
import time

import numpy as np

from cluster.balance.decide import MoveTerms
from cluster.balance.phases import WorkerPhases
from cluster.balance.types import Floats
from cluster.balance.window import LoadWindow, PhaseLoads
from cluster.config import BalanceConfig
from cluster.control.balancing import Placed, Proposal, make_phase_loads, propose
from cluster.control.routes import Shares
from cluster.control_server import Rebalanced
from cluster.placement import Placement
from cluster.rollout import Rollout
from cluster.state import ClusterState
from wire.errors import MorayError, StaleTable
from wire.metrics import Metrics
from wire.phases import PHASES, Phase
from wire.proto import expert_pb2

_log = logging.getLogger(__name__)


class Balancer:
    """The controller's balancing; on its loop. Planning runs in a thread: it can take seconds."""

    def __init__(
        self, config: BalanceConfig, *, state: ClusterState, rollout: Rollout, metrics: Metrics
    ) -> None:
        self._config = config
        self._state = state
        self._rollout = rollout
        self._metrics = metrics
        self._window = LoadWindow(half_life_s=config.half_life_s)
        self._new_rows: dict[Phase, dict[int, Floats]] = {phase: {} for phase in PHASES}
        """Rows since the window was folded last."""
        self._expert_bytes = 1
        self._next_step_s = 0.0
        """When the next step of a move may begin, on the monotonic clock."""
        self._moving = asyncio.Lock()
        self._is_short = False
        """Whether each phase should have a placement and cannot."""

    def on_beat(self, report: expert_pb2.BeatReport) -> None:
        """Counts what an expert worker has computed since its last heartbeat."""
        self._expert_bytes = max(self._expert_bytes, report.expert_bytes)
        for layer in report.rows:
            new_rows = self._new_rows["prefill" if layer.is_prefill else "decode"]
            if layer.layer_idx not in new_rows:
                new_rows[layer.layer_idx] = np.zeros(self._state.num_experts)
            new_rows[layer.layer_idx][layer.expert_idx] += layer.num_rows

    async def run(self) -> None:
        """Looks at the load every `balance.interval_s`, for ever."""
        while self._config.enabled:
            await asyncio.sleep(self._config.interval_s)
            loads = self._fold()
            num_rows = self._window.num_rows(now_s=time.monotonic())
            if num_rows < max(1, self._config.min_rows) or self._state.waiting_for():
                continue
            # A load that failed has been logged, counted and taken back: the next look tries again.
            with contextlib.suppress(MorayError):
                await self._rebalance(loads, force=False)

    async def rebalance(self, *, force: bool, seed: int) -> Rebalanced:
        """Plans anew for the load of late, or for one made up from a seed, and carries it out.

        Args:
            force: moves even if it is not worth it.
            seed: of made-up loads; 0 = the real ones.

        Raises:
            NotReady: nothing is placed yet.
            StaleTable: workers came or went meanwhile; the cluster is placed anew for that.
            MorayError: a worker could not load what it should; everything is as before.
        """
        placed = self._state.placed()
        loads = make_phase_loads(placed.shape, seed) if seed else self._fold()
        return await self._rebalance(loads, force=force)

    async def _rebalance(self, loads: PhaseLoads, *, force: bool) -> Rebalanced:
        async with self._moving:
            await self._rollout.wait_for(lambda: self._state.tables.is_settled)
            placed = self._state.placed()
            proposal = await asyncio.to_thread(
                propose, placed, loads, self._terms(), placements=self._config.placements
            )
            self._say_phases(placed, proposal)
            self._metrics.gauge("load_balance_ratio").set(proposal.balance)
            for phase, balance in proposal.phase_balance.items():
                self._metrics.gauge("phase_load_balance_ratio", phase=phase).set(balance)
            reason = "forced" if force else proposal.decision.reason
            self._metrics.counter("replans_total", result=reason).inc()
            if not force and not proposal.decision.is_worth:
                return Rebalanced(table_version=self._state.table_version, num_moved=0)
            num_moved = await self._move(placed.placement, proposal)
            _log.info("moved %d experts for %s, balance was %.3f", num_moved, reason, proposal.balance)
            return Rebalanced(table_version=self._state.table_version, num_moved=num_moved)

    def _terms(self) -> MoveTerms:
        return MoveTerms(
            bytes_per_expert=self._expert_bytes,
            bytes_per_s=self._config.bytes_per_s,
            step_bytes=max(1, int(self._config.bytes_per_s)),
            stay_s=self._config.half_life_s,
            min_gain=self._config.min_gain,
        )

    async def _move(self, before: Placement, proposal: Proposal) -> int:
        """Carries a proposal out, step by step; the copies that were loaded."""
        tables = self._state.tables
        old_shares, old_phases = tables.shares, tables.worker_phases
        steps = [step.placement for step in proposal.decision.steps[:-1]]
        num_moved = 0
        try:
            for placement in steps:
                num_moved += await self._take_step(placement, {}, old_phases)
            num_moved += await self._take_step(proposal.candidate, proposal.shares, proposal.worker_phases)
        except MorayError as error:
            self._metrics.counter("replans_total", result="rolled_back").inc()
            if not isinstance(error, StaleTable):
                tables.set_placement(before, old_shares, worker_phases=old_phases)
                await self._rollout.follow_up()
            raise
        return num_moved

    def _say_phases(self, placed: Placed, proposal: Proposal) -> None:
        """Logs once when phases cannot have placements of their own, and again when they can."""
        is_short = self._config.placements == "by_phase" and not proposal.worker_phases
        if is_short and not self._is_short:
            _log.warning(
                "balance.placements=by_phase: %d expert workers with expert.num_slots=%d do not hold all %d "
                "experts twice, or there were no rows yet; one placement serves both phases",
                len(placed.hosts), placed.num_slots, placed.shape.num_experts,
            )  # fmt: skip
        self._is_short = is_short

    async def _take_step(self, placement: Placement, shares: Shares, phases: WorkerPhases) -> int:
        """Returns when a placement is in force; begins when the step before has been paid for."""
        await asyncio.sleep(max(0.0, self._next_step_s - time.monotonic()))
        began_s = time.monotonic()
        tables = self._state.tables
        if set(placement) != set(tables.placement or ()):
            raise StaleTable("workers joined or left while experts were being moved")
        failures = self._rollout.failures
        for worker_id in placement:
            failures.pop(worker_id, None)
        tables.set_placement(placement, shares, worker_phases=phases)
        num_moved = tables.num_missing
        await self._rollout.follow_up()
        await self._rollout.wait_for(lambda: tables.is_settled or any(w in failures for w in placement))
        if failed := [worker_id for worker_id in placement if worker_id in failures]:
            raise failures[failed[0]]
        self._metrics.counter("moves_total").inc(num_moved)
        self._metrics.counter("moved_bytes_total").inc(num_moved * self._expert_bytes)
        budget_s = num_moved * self._expert_bytes / self._config.bytes_per_s
        self._next_step_s = began_s + max(budget_s, self._config.pause_s)
        return num_moved

    def _fold(self) -> PhaseLoads:
        now_s = time.monotonic()
        for phase in PHASES:
            self._window = self._window.fold(phase, self._new_rows[phase], now_s=now_s)
            self._new_rows[phase] = {}
        loads = self._window.by_phase(now_s=now_s)
        self._state.on_loads(loads)
        return loads
