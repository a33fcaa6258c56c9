"""Readiness tells the truth: what keeps a worker from making tokens, and when it can make them again."""

import threading
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.workers.lab import Cluster, open_cluster, run_test, until
from wire.proto import control_pb2

PROMPT = [5, 6, 7, 8]
BOTH: dict[str, dict[str, Any]] = {"both-0": {"probe_s": 0.1, "stuck_s": 0.3}}


async def is_serving(cluster: Cluster, worker_id: str = "both-0") -> bool:
    """What the worker's gRPC health says."""
    stub = health_pb2_grpc.HealthStub(cluster.channel(cluster.attention[worker_id]))
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="moray.v1.Attention"))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def until_said(cluster: Cluster, words: str, worker_id: str = "both-0") -> None:
    """Waits until the worker has told the controller so; "" = that it takes requests."""
    told = cluster.controller.troubles

    def is_told() -> bool:
        trouble = told.get(worker_id)
        return trouble is not None and (words in trouble if words else not trouble)

    await until(is_told)


def test_worker_is_ready_when_it_has_a_routing_table() -> None:
    async def main() -> None:
        async with open_cluster(attention=BOTH) as cluster:
            cluster.controller.snapshot = control_pb2.ClusterSnapshot()
            await cluster.start_attention("both-1")
            await until_said(cluster, "no routing table", "both-1")
            assert not await is_serving(cluster, "both-1")
            await cluster.push()
            await until_said(cluster, "", "both-1")
            assert await is_serving(cluster, "both-1")

    run_test(main())


def test_worker_without_any_expert_worker_is_not_ready_until_one_is_back() -> None:
    async def main() -> None:
        async with open_cluster(attention=BOTH) as cluster:
            await until_said(cluster, "")
            snapshot = control_pb2.ClusterSnapshot()
            snapshot.CopyFrom(cluster.controller.snapshot)
            for member in snapshot.members:
                if member.role == control_pb2.ROLE_EXPERT:
                    member.address = ""
            cluster.controller.push(snapshot)
            await until_said(cluster, "no expert worker")
            assert not await is_serving(cluster)
            await cluster.push()
            await until_said(cluster, "")
            assert len(await cluster.generate(PROMPT, at="both-0", max_tokens=4)) == 4

    run_test(main())


def test_engine_that_fails_every_step_asks_to_be_replaced_and_is_ready_when_it_mends() -> None:
    async def main() -> None:
        async with open_cluster(attention=BOTH) as cluster:
            await until_said(cluster, "")
            server = cluster.attention["both-0"].server
            experts = server._engine._experts
            works = experts.begin_step

            def fails(phase: str) -> None:
                raise RuntimeError("boom")

            experts.begin_step = fails
            await until_said(cluster, "boom")
            assert not await is_serving(cluster)
            await until(lambda: server._checkup.verdict.needs_restart)
            experts.begin_step = works
            await until_said(cluster, "")
            assert await is_serving(cluster)

    run_test(main())


def test_step_that_does_not_end_is_told_while_it_lasts() -> None:
    async def main() -> None:
        async with open_cluster(attention=BOTH) as cluster:
            await until_said(cluster, "")
            experts, go_on = cluster.attention["both-0"].server._engine._experts, threading.Event()
            begin_step = experts.begin_step
            experts.begin_step = lambda phase: (go_on.wait(), begin_step(phase))
            call = cluster.open_generate(PROMPT, at="both-0", max_tokens=4)
            stream = aiter(call)
            await until_said(cluster, "a step has not ended")
            go_on.set()
            assert [len(event.token_ids) async for event in stream] == [1, 1, 1, 1]
            await until_said(cluster, "")

    run_test(main())


def test_engine_whose_thread_is_gone_asks_to_be_replaced() -> None:
    async def main() -> None:
        async with open_cluster(attention=BOTH) as cluster:
            await until_said(cluster, "")
            server = cluster.attention["both-0"].server
            server._engine.stop()
            await until_said(cluster, "engine has ended")
            assert server._checkup.verdict.needs_restart
            del cluster.attention["both-0"]
            await server.stop(grace_s=0)

    run_test(main())
