"""What workers tell the controller: which table an engine uses, and how many rows experts had."""

import threading
from collections import Counter
from typing import Any

from tests.integration.workers.lab import Cluster, open_cluster, run_test, until
from wire.phases import PHASES, Phase
from wire.proto import expert_pb2, expert_pb2_grpc

PROMPT = [5, 6, 7, 8]


async def beat(cluster: Cluster, worker_id: str, scale: Any = None) -> expert_pb2.BeatReport:
    stub = expert_pb2_grpc.ExpertStub(cluster.channel(cluster.experts[worker_id]))
    return await stub.Beat(expert_pb2.BeatRequest(scale=scale), metadata=cluster.handshake.to_metadata())


def test_idle_and_busy_workers_report_every_table_that_they_take_up() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            reported = cluster.controller.reported
            await until(lambda: reported == {"prefill-0": 1, "decode-0": 1})
            call = cluster.open_generate(PROMPT, max_tokens=60)
            await anext(aiter(call))
            await cluster.push()
            await until(lambda: reported == {"prefill-0": 2, "decode-0": 2})
            async for _ in call:
                pass

    run_test(main())


def test_table_is_not_reported_while_a_step_under_an_older_one_runs() -> None:

    async def main() -> None:
        async with open_cluster(attention={"both-0": {}}) as cluster:
            engine = cluster.attention["both-0"].server._engine
            began, go_on = _pause_steps(engine._experts)
            call = cluster.open_generate(PROMPT, at="both-0", prefill="", max_tokens=4)
            await until(began.is_set)
            await cluster.push()
            await until(lambda: cluster.attention["both-0"].server._table_version == 2)
            for _ in range(20):
                await beat(cluster, "expert-0")  # the loop has turns enough to send what it would
            assert cluster.controller.reported["both-0"] == 1
            go_on.set()
            await until(lambda: cluster.controller.reported["both-0"] == 2)
            async for _ in call:
                pass

    run_test(main())


def test_beats_bring_every_row_once() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            await cluster.generate(PROMPT, max_tokens=6)
            rows: Counter[tuple[str, int]] = Counter()
            for worker_id in cluster.experts:
                for layer in (await beat(cluster, worker_id)).rows:
                    rows["prefill" if layer.is_prefill else "decode", layer.layer_idx] += sum(layer.num_rows)
            for phase in PHASES:
                total = sum(cluster.metric(w, "rows_total", phase=phase) for w in cluster.experts)
                assert sum(num_rows for (of, _), num_rows in rows.items() if of == phase) == total > 0
            assert {layer for _, layer in rows} <= set(cluster.config.expert_layer_ids)
            first = cluster.config.first_k_dense_replace
            top_k = cluster.config.num_experts_per_tok
            assert rows["prefill", first] == top_k * len(PROMPT)
            assert rows["decode", first] >= top_k * 5
            again = [await beat(cluster, worker_id) for worker_id in cluster.experts]
            assert [len(report.rows) for report in again] == [0, 0]
            assert all(report.expert_bytes > 0 for report in again)
            assert cluster.metric("expert-0", "top_expert_rows", rank="1") > 0
            assert 0 < cluster.metric("expert-0", "load_balance_ratio") <= 1

    run_test(main())


def test_sizes_that_a_beat_brought_are_described() -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            scale = expert_pb2.Scale(version=3, num_workers={"expert": 4})
            await beat(cluster, "expert-0", scale)
            stub = expert_pb2_grpc.ExpertStub(cluster.channel(cluster.experts["expert-0"]))
            report = await stub.Describe(
                expert_pb2.DescribeRequest(), metadata=cluster.handshake.to_metadata()
            )
            assert report.scale == scale

    run_test(main())


def _pause_steps(experts: Any) -> tuple[threading.Event, threading.Event]:
    """Holds the engine up when a step has taken its table; events: one has, and all may go on."""
    began, go_on = threading.Event(), threading.Event()
    begin_step = experts.begin_step

    def begin_and_wait(phase: Phase) -> None:
        begin_step(phase)
        began.set()
        go_on.wait()

    experts.begin_step = begin_and_wait
    return began, go_on
