"""`moray bench load` against a router that does as it is told: what is sent, when, and what is noted."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from typer.testing import CliRunner

from cluster.bench.load.arrivals import SyntheticLoad
from cluster.bench.load.measure import LoadResult, LoadSpec, TracedLoad, measure_load
from cluster.bench.load.trace import TraceRules
from cluster.cli.app import app
from wire.errors import ConfigError, NotReady, Overloaded
from wire.proto import control_pb2, inference_pb2, inference_pb2_grpc
from wire.rpc import stream_errors

VOCAB_TOKENS = 300
LOAD = SyntheticLoad(
    arrivals="poisson", num_requests=12, rate_per_s=200, prompt_tokens=6, new_tokens=3, shared_tokens=2
)


@dataclass
class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """Answers every request with as many tokens as it asks for, those without room with a refusal."""

    room: int = 1000
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)
    num_open: int = 0
    most_open: int = 0

    async def GetCluster(self, request: Any, context: Any) -> control_pb2.ClusterSnapshot:
        model = control_pb2.ModelInfo(name="fake", vocab_tokens=VOCAB_TOKENS, max_context_tokens=64)
        return control_pb2.ClusterSnapshot(model=model)

    @stream_errors
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.prompts.append(tuple(request.tokens.ids))
        self.peers.add(context.peer())
        if self.num_open >= self.room:
            raise Overloaded("full", retry_after_s=1.5)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        for idx in range(request.max_tokens):
            await asyncio.sleep(0.002)
            usage = inference_pb2.Usage(cached_tokens=4) if idx == request.max_tokens - 1 else None
            yield inference_pb2.GenerateResponse(first_idx=idx, token_ids=[7], usage=usage)
        self.num_open -= 1


@dataclass(frozen=True)
class Served:
    """A fake router, and where it listens."""

    router: FakeRouter
    address: str


@pytest.fixture
def served() -> Iterator[Served]:
    """On a loop and a thread of its own: the load has its own loop too."""
    router, loop = FakeRouter(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    yield Served(router, f"127.0.0.1:{port}")
    asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def measure(served: Served, source: SyntheticLoad | TracedLoad = LOAD, **spec: Any) -> LoadResult:
    return measure_load(
        served.address, LoadSpec(source=source, seed=1, **spec), on_progress=lambda _done, _total: None
    )


def test_every_request_is_sent_once_and_its_answer_noted(served: Served) -> None:
    result = measure(served)
    assert result.model == "fake"
    assert (result.report.num_done, result.report.num_requests) == (12, 12)
    assert len(set(served.router.prompts)) == len(served.router.prompts) == 12
    assert [len(outcome.token_s) for outcome in result.outcomes] == [3] * 12
    assert result.report.cached_share == 4 / 6
    assert result.report.ttft_ms.p50 > 0 < result.report.itl_ms.p50


def test_requests_are_sent_when_they_are_due_whatever_is_still_open(served: Served) -> None:
    outcomes = measure(served).outcomes
    assert all(outcome.sent_s >= outcome.due_s for outcome in outcomes)
    assert [o.due_s for o in outcomes] == sorted(o.due_s for o in outcomes)


def test_a_closed_loop_has_as_many_requests_open_as_clients(served: Served) -> None:
    result = measure(served, clients=3)
    assert result.report.num_done == 12
    assert served.router.most_open == 3
    assert result.report.late_ms.highest < result.report.answer_ms.highest


def test_connections_are_as_many_as_asked(served: Served) -> None:
    measure(served, connections=4)
    assert len(served.router.peers) == 4


def test_refusals_are_told_from_answers_and_timed(served: Served) -> None:
    served.router.room = 0
    report = measure(served).report
    assert (report.num_done, report.num_refused, report.num_failed) == (0, 12, 0)
    assert report.refusal_ms.p50 > 0
    assert report.retry_after_ms.mean == 1500
    assert report.errors == {"Overloaded: full": 12}


def test_a_deadline_ends_requests_that_take_longer(served: Served) -> None:
    report = measure(served, deadline_s=0.001).report
    assert (report.num_done, report.num_failed) == (0, 12)
    assert all(error.startswith("DeadlinePassed") for error in report.errors)


def test_a_trace_is_sent_as_it_was(served: Served, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 10 * i, "input_length": 640, "output_length": 32, "hash_ids": [0, i]} for i in range(5)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    traced = TracedLoad(file=str(file), rules=TraceRules(token_scale=1 / 16, speed=2))
    result = measure(served, traced)
    assert [len(prompt) for prompt in served.router.prompts] == [40] * 5
    assert len({prompt[:32] for prompt in served.router.prompts}) == 1
    assert [outcome.due_s for outcome in result.outcomes] == [0, 0.005, 0.01, 0.015, 0.02]


def test_requests_beyond_the_context_are_refused_before_any_is_sent(served: Served) -> None:
    with pytest.raises(ConfigError, match="context of 64"):
        measure(
            served,
            SyntheticLoad(arrivals="constant", num_requests=1, rate_per_s=1, prompt_tokens=60, new_tokens=5),
        )
    assert served.router.prompts == []


def test_a_trace_that_cannot_be_read_is_named(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        measure(served, TracedLoad(file=str(tmp_path / "nowhere"), rules=TraceRules()))


def test_an_address_without_a_router_says_so() -> None:
    with pytest.raises(NotReady, match=r"no router answers at 127\.0\.0\.1:1"):
        measure(Served(FakeRouter(), "127.0.0.1:1"))


SMALL = ("--requests", "8", "--rate", "200", "--prompt-tokens", "6", "--new-tokens", "3")


def command(served: Served, *flags: str) -> str:
    done = CliRunner().invoke(app, ["bench", "load", "--address", served.address, *SMALL, *flags])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_one_json_object_and_draws(served: Served, tmp_path: Path) -> None:
    png = tmp_path / "load.png"
    found = json.loads(command(served, "--json", "--plot", str(png), "--slo-ttft-ms", "60000"))
    assert (found["model"], found["num_done"], found["good_share"]) == ("fake", 8, 1.0)
    assert found["spec"]["source"]["arrivals"] == "poisson"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_tables_for_people(served: Served) -> None:
    served.router.room = 0
    shown = command(served, "--clients", "2", "--slo-itl-ms", "1")
    for part in (
        "2 clients in a closed loop",
        "first token",
        "refusal",
        "8 refused",
        "goodput",
        "cache hits",
    ):
        assert part in shown
