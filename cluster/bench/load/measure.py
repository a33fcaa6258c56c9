"""`moray bench load`: the requests of a spec, sent to a router, and the figures of it."""

import asyncio
import os
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.load.arrivals import SyntheticLoad, make_requests
from cluster.bench.load.drive import DriveSpec, OnProgress, drive
from cluster.bench.load.report import LoadReport, make_report
from cluster.bench.load.trace import TraceRules, read_trace, requests_of
from cluster.bench.load.types import LoadRequest, Objectives, Outcome
from cluster.client import InferenceClient
from wire.errors import ConfigError
from wire.proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class TracedLoad:
    """Requests of a trace."""

    file: str
    rules: TraceRules


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """What to send, how, and what counts as good."""

    source: SyntheticLoad | TracedLoad
    seed: int
    connections: int = 1
    clients: int = 0
    """Of a closed loop; 0 = requests arrive at their own moments."""
    deadline_s: float | None = None
    """Of each request."""
    objectives: Objectives = field(default_factory=Objectives)


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What became of every request, and the figures."""

    spec: LoadSpec
    model: str
    outcomes: tuple[Outcome, ...]
    report: LoadReport

    def to_json(self) -> dict[str, Any]:
        """Everything but the single requests, for machines."""
        machine = {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        }
        return {"model": self.model, "spec": asdict(self.spec), "machine": machine, **self.report.to_json()}


def measure_load(address: str, spec: LoadSpec, *, on_progress: OnProgress) -> LoadResult:
    """Sends the load to the router at an address.

    Raises:
        ConfigError: the trace cannot be read, or a request does not fit the model's context.
        MorayError: no router answers there.
    """
    model = asyncio.run(_model_at(address))
    requests = plan_load(spec, model)
    drive_spec = DriveSpec(
        address=address, connections=spec.connections, clients=spec.clients, deadline_s=spec.deadline_s
    )
    outcomes = drive(drive_spec, requests, on_progress=on_progress)
    report = make_report(outcomes, objectives=spec.objectives)
    return LoadResult(spec=spec, model=model.name, outcomes=tuple(outcomes), report=report)


def plan_load(spec: LoadSpec, model: control_pb2.ModelInfo) -> list[LoadRequest]:
    """The requests of a spec for a model, in order of arrival.

    Raises:
        ConfigError: the trace cannot be read, or a request does not fit the model's context.
    """
    vocab_tokens = model.vocab_tokens
    if isinstance(spec.source, TracedLoad):
        requests = _read(spec.source, vocab_tokens)
    else:
        requests = make_requests(spec.source, vocab_tokens=vocab_tokens, rng=random.Random(spec.seed))
    _check_context(requests, model, is_trace=isinstance(spec.source, TracedLoad))
    return requests


def _read(source: TracedLoad, vocab_tokens: int) -> list[LoadRequest]:
    try:
        with Path(source.file).open(encoding="utf-8") as lines:
            traced = read_trace(lines, name=source.file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            field="--trace", wanted="a readable file", given=f"{source.file}: {error}"
        ) from error
    return requests_of(traced, vocab_tokens=vocab_tokens, rules=source.rules)


def _check_context(requests: Sequence[LoadRequest], model: control_pb2.ModelInfo, *, is_trace: bool) -> None:
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    if longest > model.max_context_tokens:
        field = "--token-scale" if is_trace else "--prompt-tokens"
        wanted = f"prompt and new tokens within the context of {model.max_context_tokens}"
        given = f"a request of {longest}"
        raise ConfigError(field=field, wanted=wanted, given=given, hint="make them shorter")


async def _model_at(address: str) -> control_pb2.ModelInfo:
    async with InferenceClient(address) as client:
        return (await client.cluster()).model
