"""`moray bench throughput`: prefill and decode rates, held against what the machine allows.

Topologies that are compared are up at the same time and take turns.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cluster.bench.limits import MachineLimits, measure_limits
from cluster.bench.places import Place, in_cluster, in_process
from cluster.bench.streams import (
    Ask,
    Rate,
    decode_profile,
    decode_rates,
    prefill_profile,
    prefill_rates,
    random_prompts,
)
from cluster.bench.work import Forms, StepWork, count_step
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kernels.choose import choose_kernels
from model.precision import Form, Precision, expert_form, head_form, matrix_form
from model.profile import StepClock
from model.tensor_names import expert_prefix
from model.weights import OnProgress
from wire.errors import ConfigError

Topology = Literal["in-process", "cluster"]
Phase = Literal["prefill", "decode"]
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class ThroughputSpec:
    """What to measure."""

    model: str
    """What a cluster is told: a directory or a name."""
    path: Path
    """Its directory."""
    dtypes: tuple[Precision, ...]
    topologies: tuple[Topology, ...]
    batches: tuple[int, ...]
    prefill_tokens: int
    prompt_tokens: int
    """Of the prompts that are decoded from."""
    new_tokens: int
    step_tokens: int
    num_threads: int
    num_experts: int
    """Expert workers of a cluster."""
    repeats: int
    has_profile: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    topology: Topology
    dtype: Precision
    phase: Phase
    batch: int
    tokens_per_s: Rate
    limits: MachineLimits
    """The machine's rates just before: a virtual machine's memory rate halves and doubles within minutes."""
    bound_tokens_per_s: float
    """What those rates allow one process that does nothing else, a step's phases one after another."""
    overlapped_bound_tokens_per_s: float
    """What they would allow if phases did not need each other."""
    step_ms: dict[str, float] | None
    """Part of the model -> milliseconds of one step; for prefill, of the whole prompt."""
    of_in_process: float | None
    """The rate as a part of one process's in the same run; None where only one topology was measured."""

    @property
    def share_of_bound(self) -> float:
        """Of the bound, what was reached."""
        return self.tokens_per_s.median / self.bound_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """All measurements of one run, and the machine that they belong to."""

    spec: ThroughputSpec
    kernels: str
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        spec = asdict(self.spec) | {"path": str(self.spec.path), "seed": SEED}
        machine = {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernels": self.kernels,
        }
        rows = [asdict(row) | {"share_of_bound": row.share_of_bound} for row in self.rows]
        return {"spec": spec, "machine": machine, "rows": rows}


def measure_throughput(spec: ThroughputSpec, *, on_progress: OnProgress | None = None) -> ThroughputReport:
    """Runs every measurement of a spec; on_progress counts experts while a model loads.

    Raises:
        ConfigError: the model's context is too short for what is asked, too few tokens are, or a number is
            out of range.
        MorayError: the model cannot be served.
    """
    checkpoint = Checkpoint.open(spec.path)
    _check(spec, checkpoint.config)
    kernels = choose_kernels(num_threads=spec.num_threads)
    rows: list[Row] = []
    for dtype in spec.dtypes:
        runs = _Runs(
            spec=spec,
            bound=_Bound(checkpoint, spec, dtype),
            measure_limits=lambda: measure_limits(kernels, num_threads=spec.num_threads),
            vocab_size=checkpoint.config.vocab_size,
            dtype=dtype,
            clock=StepClock() if spec.has_profile and "in-process" in spec.topologies else None,
        )
        with contextlib.ExitStack() as places:
            asks = {
                topology: places.enter_context(_asking(checkpoint, topology, runs, on_progress))
                for topology in spec.topologies
            }
            rows += runs.rows(asks)
    rows.sort(key=lambda row: spec.topologies.index(row.topology))
    return ThroughputReport(spec=spec, kernels=kernels.name, rows=tuple(rows))


def stored_forms(checkpoint: Checkpoint, dtype: Precision) -> Forms:
    """How a precision holds a checkpoint's weights; the query projection stands for the other matrices."""
    layer_idx = checkpoint.config.moe_layer_ids[0]
    expert = _stored_form(checkpoint, f"{expert_prefix(layer_idx, 0)}gate_proj.weight")
    other = _stored_form(checkpoint, "model.layers.0.self_attn.q_a_proj.weight")
    head = _stored_form(checkpoint, "lm_head.weight")
    return Forms(
        experts=expert_form(dtype, stored=expert),
        head=head_form(dtype, stored=head),
        others=matrix_form(dtype, stored=other),
    )


def _stored_form(checkpoint: Checkpoint, name: str) -> Form:
    return checkpoint.read_stored(name, shape=checkpoint.shape(name)).form


def _check(spec: ThroughputSpec, config: ModelConfig) -> None:
    """Refuses prompts that the model has no context for, and numbers that no worker takes."""
    needed = {
        "--prefill-tokens": spec.prefill_tokens + 1,
        "--prompt-tokens": spec.prompt_tokens + spec.new_tokens,
    }
    for field, num_tokens in needed.items():
        if num_tokens > config.max_position_embeddings:
            wanted = f"prompt and new tokens within the context of {config.max_position_embeddings}"
            raise ConfigError(field=field, wanted=wanted, given=str(num_tokens))
    _place(spec, spec.dtypes[0]).group()


def _place(spec: ThroughputSpec, dtype: Precision) -> Place:
    most = max(spec.batches, default=1)
    return Place(
        dtype=dtype,
        num_threads=spec.num_threads,
        num_cached_tokens=max(spec.prefill_tokens + 1, most * (spec.prompt_tokens + spec.new_tokens)),
        step_tokens=spec.step_tokens,
        num_requests=most,
    )


class _Bound:
    """What the machine allows: the steps of a phase, and the tokens that they make."""

    def __init__(self, checkpoint: Checkpoint, spec: ThroughputSpec, dtype: Precision) -> None:
        self._config = checkpoint.config
        self._forms = stored_forms(checkpoint, dtype)
        self._spec = spec

    def prefill(self) -> tuple[list[StepWork], int]:
        """The prompt's chunks."""
        num_tokens, step = self._spec.prefill_tokens, self._spec.step_tokens
        chunks = [range(begin, min(begin + step, num_tokens)) for begin in range(0, num_tokens, step)]
        steps = [
            self._count(rows, num_scored=int(rows.stop == num_tokens), is_prompt=True) for rows in chunks
        ]
        return steps, num_tokens

    def decode(self, batch: int) -> tuple[list[StepWork], int]:
        """A step at the middle of the new tokens."""
        position = self._spec.prompt_tokens + self._spec.new_tokens // 2
        return [self._count([position] * batch, num_scored=batch, is_prompt=False)], batch

    def _count(self, positions: Sequence[int], *, num_scored: int, is_prompt: bool) -> StepWork:
        return count_step(
            self._config, self._forms, positions=positions, num_scored=num_scored, is_prompt=is_prompt
        )


@contextlib.contextmanager
def _asking(
    checkpoint: Checkpoint, topology: Topology, runs: "_Runs", on_progress: OnProgress | None
) -> Iterator[Ask]:
    spec, place = runs.spec, _place(runs.spec, runs.dtype)
    if topology == "cluster":
        with in_cluster(spec.model, place, num_experts=spec.num_experts) as ask:
            yield ask
    else:
        with in_process(checkpoint, place, clock=runs.clock, on_progress=on_progress) as ask:
            yield ask


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Every measurement of one precision."""

    spec: ThroughputSpec
    bound: _Bound
    measure_limits: Callable[[], MachineLimits]
    vocab_size: int
    dtype: Precision
    clock: StepClock | None
    """Of the engine in this process."""

    def rows(self, asks: Mapping[Topology, Ask]) -> Iterator[Row]:
        """Measures prefill, then every batch size."""
        spec, places = self.spec, list(asks.values())
        clock, ask_here = self.clock, asks.get("in-process")
        profile = None
        if spec.prefill_tokens:
            prompts = self._prompts(spec.repeats + 1, spec.prefill_tokens)
            limits = self.measure_limits()
            rates = prefill_rates(places, prompts)
            if clock is not None and ask_here is not None:
                profile = prefill_profile(ask_here, prompts[0], clock)
            yield from self._rows("prefill", 1, dict(zip(asks, rates, strict=True)), limits, profile)
        for batch in spec.batches:
            prompts = self._prompts(batch, spec.prompt_tokens)
            limits = self.measure_limits()
            rates = decode_rates(places, prompts, num_tokens=spec.new_tokens, repeats=spec.repeats)
            if clock is not None and ask_here is not None:
                profile = decode_profile(ask_here, prompts, clock, num_tokens=spec.new_tokens)
            yield from self._rows("decode", batch, dict(zip(asks, rates, strict=True)), limits, profile)

    def _prompts(self, num: int, num_tokens: int) -> list[list[int]]:
        return random_prompts(num, num_tokens=num_tokens, vocab_size=self.vocab_size, seed=SEED)

    def _rows(
        self,
        phase: Phase,
        batch: int,
        rates: Mapping[Topology, Rate],
        limits: MachineLimits,
        profile: dict[str, float] | None,
    ) -> Iterator[Row]:
        steps, num_tokens = self.bound.prefill() if phase == "prefill" else self.bound.decode(batch)
        here = rates.get("in-process")
        for topology, rate in rates.items():
            yield Row(
                topology=topology,
                dtype=self.dtype,
                phase=phase,
                batch=batch,
                tokens_per_s=rate,
                limits=limits,
                bound_tokens_per_s=num_tokens / sum(step.bound_s(limits) for step in steps),
                overlapped_bound_tokens_per_s=num_tokens
                / sum(step.overlapped_bound_s(limits) for step in steps),
                step_ms=profile if rate is here else None,
                of_in_process=None if here is None or rate is here else rate.median / here.median,
            )
