"""The whole controller over real gRPC with fake processes: losses, tables' lives, moves, sizes, restarts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.integration.cluster.lab import SHAPE, FakeLauncher, Lab, free_port, running
from wire.proto import control_pb2

TEST_S = 20
THREE = {"expert": {"replicas": 3}}
APART = {"expert": {"replicas": 4, "num_slots": 3}, "balance": {"placements": "by_phase"}}
REPLICATED = {"expert": {"replicas": 3, "num_slots": 4}}
ALL = {(layer, expert) for layer in SHAPE.layer_ids for expert in range(SHAPE.num_experts)}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, TEST_S))


async def up(lab: Lab) -> None:
    await lab.until(lambda: lab.is_whole() and bool(lab.tables))


def test_cluster_comes_up_with_every_expert_once() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            assert lab.table_workers() == ["expert-0", "expert-1", "expert-2"]
            assert [lab.launcher.experts[w].num_loads for w in lab.table_workers()] == [1, 1, 1]
            assert [len(lab.launcher.experts[w].places) for w in lab.table_workers()] == [4, 4, 4]

    run(test())


def test_silent_worker_is_killed_and_its_experts_serve_meanwhile_elsewhere() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            lab.launcher.experts["expert-1"].is_silent = True
            began_s = asyncio.get_running_loop().time()
            await lab.until(lambda: lab.table_workers() == ["expert-0", "expert-2"])
            assert asyncio.get_running_loop().time() - began_s < 2.0
            await lab.until(lambda: lab.table_workers() == ["expert-0", "expert-1", "expert-2"])
            await lab.until(lab.is_whole)
            assert lab.launcher.num_starts["expert-1"] == 2
            assert lab.metric("heartbeats_missed_total") >= 4

    run(test())


def test_dead_worker_with_replicas_leaves_the_table_before_anything_is_loaded() -> None:
    async def test() -> None:
        async with running(REPLICATED) as lab:
            await up(lab)
            loads = {w: lab.launcher.experts[w].num_loads for w in ("expert-0", "expert-1", "expert-2")}
            covered = lab.launcher.experts["expert-0"].places | lab.launcher.experts["expert-2"].places
            before = lab.tables[-1].version
            await lab.launcher.die("expert-1")
            await lab.until(lambda: lab.tables[-1].version > before)
            if covered == ALL:
                assert lab.launcher.experts["expert-0"].num_loads == loads["expert-0"]
            await up(lab)

    run(test())


def test_two_of_three_lost_at_once_are_carried_by_the_third() -> None:
    async def test() -> None:
        async with running({"controller": {"restart_delay_s": 0.5}} | THREE) as lab:
            await up(lab)
            lab.launcher.experts["expert-0"].is_silent = True
            await lab.launcher.die("expert-1")
            await lab.until(lambda: lab.table_workers() == ["expert-2"])
            assert lab.launcher.experts["expert-2"].places == ALL
            await lab.until(lambda: lab.table_workers() == ["expert-0", "expert-1", "expert-2"])
            await lab.until(lab.is_whole)
            assert len(lab.launcher.experts["expert-2"].places) == 4

    run(test())


def test_old_copies_stay_until_the_readers_use_the_newer_table() -> None:
    async def test() -> None:
        async with running({"controller": {"reader_lease_s": 60.0}} | THREE) as lab:
            await up(lab)
            lab.launcher.readers["decode-0"].reports = False
            before = {w: e.places for w, e in lab.launcher.experts.items()}
            await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=4))
            await asyncio.sleep(0.3)
            assert all(before[w] <= e.places for w, e in lab.launcher.experts.items())
            assert not lab.is_quiet()
            version = lab.tables[-1].version
            await lab.stub.Report(control_pb2.ReportRequest(member_id="decode-0", table_version=version))
            await lab.until(lab.is_whole)

    run(test())


def test_reader_that_falls_silent_holds_no_copies_for_ever() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            lab.launcher.readers["decode-0"].reports = False
            await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=4))
            assert not lab.is_quiet()
            await lab.until(lab.is_whole)

    run(test())


@pytest.mark.parametrize(("placements", "num_workers"), [("joint", 3), ("by_phase", 4)])
def test_many_forced_moves_in_a_row(placements: str, num_workers: int) -> None:
    async def test() -> None:
        values = {
            "expert": {"replicas": num_workers, "num_slots": 3},
            "decode": {"replicas": 2},
            "balance": {"placements": placements},
        }
        async with running(values) as lab:
            await up(lab)
            num_moved = 0
            for seed in range(1, 51):
                done = await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=seed))
                num_moved += done.num_moved
            await lab.until(lab.is_whole)
            assert num_moved > 50
            assert lab.metric("moves_total") == num_moved
            assert lab.metric("moved_bytes_total") == num_moved * 10
            assert len(set(lab.tables[-1].worker_phases.values())) == (2 if placements == "by_phase" else 0)

    run(test())


def test_steps_of_moves_are_a_pause_apart() -> None:
    async def test() -> None:
        async with running(THREE | {"balance": {"pause_s": 0.3}}) as lab:
            await up(lab)
            began_s = asyncio.get_running_loop().time()
            for seed in (1, 2, 3):
                await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=seed))
            assert 0.6 <= asyncio.get_running_loop().time() - began_s < 5

    run(test())


@pytest.mark.parametrize("values", [THREE, APART], ids=["joint", "by phase"])
def test_load_that_fails_takes_the_move_back(values: dict[str, Any]) -> None:
    async def test() -> None:
        async with running(values) as lab:
            await up(lab)
            before = {w: e.places for w, e in lab.launcher.experts.items()}
            for expert in lab.launcher.experts.values():
                expert.refuses_new = True
            with pytest.raises(grpc.aio.AioRpcError, match="disk gone"):
                await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=4))
            await lab.until(lab.is_whole)
            assert {w: e.places for w, e in lab.launcher.experts.items()} == before
            assert lab.metric("replans_total", result="rolled_back") == 1
            assert lab.tables[-1].worker_phases == {}
            for expert in lab.launcher.experts.values():
                expert.refuses_new = False
            done = await lab.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=4))
            assert done.num_moved > 0
            # The call may be answered before the stream of tables has brought the new one.
            await lab.until(lambda: lab.tables[-1].version == done.table_version)
            assert bool(lab.tables[-1].worker_phases) == (values is APART)

    run(test())


def test_level_load_is_left_alone_unless_forced() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            version = lab.tables[-1].version
            done = await lab.stub.Rebalance(control_pb2.RebalanceRequest())
            assert (done.num_moved, done.table_version) == (0, version)

    run(test())


def test_skewed_load_is_balanced_without_being_asked() -> None:
    async def test() -> None:
        balance = {"enabled": True, "interval_s": 0.1, "min_rows": 100, "half_life_s": 60.0}
        async with running(THREE | {"balance": balance}) as lab:
            await up(lab)
            busy = sorted({expert for _, expert in lab.launcher.experts["expert-0"].places})
            lab.launcher.experts["expert-0"].busy_experts = busy
            await lab.until(lambda: lab.metric("moves_total") > 0)
            await lab.until(lab.is_whole)
            for expert in lab.launcher.experts.values():
                assert sum(place[1] in busy for place in expert.places) <= len(SHAPE.layer_ids)

    run(test())


def test_phases_part_with_the_first_rows_and_are_apart_under_the_next_controller() -> None:
    async def test() -> None:
        launcher, address = FakeLauncher(), f"127.0.0.1:{free_port()}"
        balance = {"enabled": True, "interval_s": 0.1, "min_rows": 100, "placements": "by_phase"}
        values = {"expert": {"replicas": 3, "num_slots": 6}, "balance": balance}
        async with running(values, launcher=launcher, address=address) as first:
            await up(first)
            assert first.metric("phase_workers", phase="both") == 3
            for expert in launcher.experts.values():
                expert.busy_experts, expert.busy_phases = [0, 1, 2], ["prefill", "decode"]
            await first.until(lambda: bool(first.tables[-1].worker_phases))
            await first.until(first.is_whole)
            apart = dict(first.tables[-1].worker_phases)
            assert set(apart.values()) == {"prefill", "decode"}
            assert first.metric("phase_workers", phase="both") == 0
            assert 0 < first.metric("phase_load_balance_ratio", phase="prefill") <= 1
            await first.until(lambda: all(e.scale.phases == apart for e in launcher.experts.values()))
            held = {worker_id: expert.places for worker_id, expert in launcher.experts.items()}
            await first.crash()
        async with running(values, launcher=launcher, address=address) as second:
            await up(second)
            assert second.tables[0].worker_phases == apart
            assert {worker_id: expert.places for worker_id, expert in launcher.experts.items()} == held

    run(test())


def test_grows_and_shrinks_without_losing_an_expert() -> None:
    async def test() -> None:
        async with running({"expert": {"replicas": 2}}) as lab:
            await up(lab)
            grown = await lab.stub.Scale(
                control_pb2.ScaleRequest(role=control_pb2.ROLE_EXPERT, num_workers=4)
            )
            assert lab.table_workers() == [f"expert-{idx}" for idx in range(4)]
            assert grown.table_version == lab.tables[-1].version
            await lab.until(lab.is_whole)
            await lab.stub.Scale(control_pb2.ScaleRequest(role=control_pb2.ROLE_EXPERT, num_workers=2))
            assert lab.table_workers() == ["expert-0", "expert-1"]
            assert sorted(lab.launcher.running()) == ["decode-0", "expert-0", "expert-1"]
            await lab.until(lab.is_whole)

    run(test())


def test_attention_workers_come_and_go() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            for num_workers in (3, 1):
                request = control_pb2.ScaleRequest(role=control_pb2.ROLE_DECODE, num_workers=num_workers)
                await lab.stub.Scale(request)
                assert sum(name.startswith("decode") for name in lab.launcher.running()) == num_workers

    run(test())


def test_worker_that_reports_trouble_is_shown_as_not_ready() -> None:
    async def is_ready_after(lab: Lab, trouble: str) -> bool:
        version = lab.tables[-1].version
        report = control_pb2.ReportRequest(member_id="decode-0", table_version=version, trouble=trouble)
        await lab.stub.Report(report)
        watch = lab.stub.Watch(control_pb2.WatchRequest(member_id="test"))
        shown = {member.worker_id: member.is_ready for member in (await watch.read()).members}
        watch.cancel()
        return shown["decode-0"]

    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            lab.launcher.readers["decode-0"].reports = False
            # A report of the reader may still be on its way.
            while await is_ready_after(lab, "it is leaving"):
                pass
            while not await is_ready_after(lab, ""):
                pass

    run(test())


@pytest.mark.parametrize("is_hopeless", [False, True], ids=["silent", "hopeless"])
def test_attention_worker_that_is_silent_or_past_mending_is_replaced(is_hopeless: bool) -> None:
    async def test() -> None:
        misses = 1000 if is_hopeless else 3
        async with running({"controller": {"report_s": 0.2, "report_misses": misses}}) as lab:
            await up(lab)
            lab.launcher.readers["decode-0"].reports = False
            if is_hopeless:
                report = control_pb2.ReportRequest(
                    member_id="decode-0", trouble="its engine has ended", needs_restart=True
                )
                await lab.stub.Report(report)
            await lab.until(lambda: lab.launcher.num_starts["decode-0"] == 2)
            assert lab.metric("restarts_total", role="decode") == 1

    run(test())


def test_role_is_kept_by_the_worker_and_by_a_controller_that_starts_again() -> None:
    async def role_of_decode_0(lab: Lab) -> int:
        watch = lab.stub.Watch(control_pb2.WatchRequest(member_id="test"))
        shown = {member.worker_id: member.role for member in (await watch.read()).members}
        watch.cancel()
        return shown["decode-0"]

    async def test() -> None:
        address, launcher = f"127.0.0.1:{free_port()}", FakeLauncher()
        values = {"decode": {"replicas": 2}}
        async with running(values, launcher=launcher, address=address) as lab:
            await up(lab)
            request = control_pb2.SetRoleRequest(worker_id="decode-0", role=control_pb2.ROLE_BOTH)
            assert (await lab.stub.SetRole(request)).snapshot_version > 0
            assert await role_of_decode_0(lab) == control_pb2.ROLE_BOTH
            await lab.launcher.die("decode-0")
            await lab.until(lambda: launcher.num_starts["decode-0"] == 2)
            await lab.until(lab.is_whole)
            assert await role_of_decode_0(lab) == control_pb2.ROLE_BOTH
            await lab.until(lambda: all("decode-0" in e.scale.roles for e in launcher.experts.values()))
            await lab.crash()
        async with running(values, launcher=launcher, address=address) as lab:
            await up(lab)
            assert await role_of_decode_0(lab) == control_pb2.ROLE_BOTH

    run(test())


@pytest.mark.parametrize("is_asked", [True, False], ids=["asked", "by-ray"])
def test_attention_workers_leave_a_node_that_is_drained_and_start_again(is_asked: bool) -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            if is_asked:
                done = await lab.stub.Drain(control_pb2.DrainRequest(node="h"))
                assert done.worker_ids == ["decode-0"]
            else:
                lab.launcher.draining.append("n")
            await lab.until(lambda: lab.launcher.num_starts["decode-0"] == 2)
            await lab.until(lab.is_whole)
            assert lab.launcher.cordoned == ["n"]
            assert lab.launcher.num_starts["expert-0"] == 1

    run(test())


def test_restarted_controller_still_keeps_away_from_a_node_and_goes_on_draining_it() -> None:
    """The attention worker had not left when the controller died; that one starts with no memory."""

    async def test() -> None:
        address, launcher = f"127.0.0.1:{free_port()}", FakeLauncher()
        async with running(THREE, launcher=launcher, address=address) as first:
            await up(first)
            launcher.is_stopping_slowly = True
            draining = asyncio.ensure_future(first.stub.Drain(control_pb2.DrainRequest(node="h")))
            await first.until(lambda: all(e.scale.cordoned_nodes == ["n"] for e in launcher.experts.values()))
            await first.crash()
            await asyncio.gather(draining, return_exceptions=True)
        launcher.is_stopping_slowly = False
        launcher.cordoned.clear()
        assert launcher.num_starts["decode-0"] == 1
        async with running(THREE, launcher=launcher, address=address) as second:
            await second.until(lambda: launcher.num_starts["decode-0"] == 2)
            await up(second)
            assert set(launcher.cordoned) == {"n"}
            assert launcher.num_starts["expert-0"] == 1

    run(test())


def test_node_that_is_not_there_cannot_be_drained() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await lab.stub.Drain(control_pb2.DrainRequest(node="elsewhere"))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_size_that_cannot_serve_is_refused_and_nothing_changes() -> None:
    async def test() -> None:
        async with running(THREE) as lab:
            await up(lab)
            with pytest.raises(grpc.aio.AioRpcError, match=r"decode\.replicas"):
                await lab.stub.Scale(control_pb2.ScaleRequest(role=control_pb2.ROLE_DECODE, num_workers=0))
            assert lab.is_whole()

    run(test())


def test_room_that_was_waited_for_is_used() -> None:
    async def test() -> None:
        async with running({"expert": {"replicas": 2}}, launcher=FakeLauncher(room=3)) as lab:
            await up(lab)
            request = control_pb2.ScaleRequest(role=control_pb2.ROLE_EXPERT, num_workers=3)
            scaling = asyncio.ensure_future(lab.stub.Scale(request))
            await lab.until(lambda: "none of 1 nodes" in lab.state.waiting_for())
            assert not scaling.done()
            lab.launcher.room = 4
            await scaling
            assert lab.table_workers() == ["expert-0", "expert-1", "expert-2"]

    run(test())


def test_restarted_controller_takes_everything_as_it_is() -> None:
    async def test() -> None:
        launcher, address = FakeLauncher(), f"127.0.0.1:{free_port()}"
        async with running({"expert": {"replicas": 2}}, launcher=launcher, address=address) as first:
            await up(first)
            await first.stub.Scale(control_pb2.ScaleRequest(role=control_pb2.ROLE_EXPERT, num_workers=3))
            await first.stub.Rebalance(control_pb2.RebalanceRequest(force=True, seed=4))
            await first.until(first.is_whole)
            await first.until(
                lambda: all(e.scale.num_workers["expert"] == 3 for e in launcher.experts.values())
            )
            held = {w: (e.places, e.num_loads) for w, e in launcher.experts.items()}
            version = first.tables[-1].version
            await first.crash()
            first.state.tables.on_worker("expert-0", [], table_version=version)
            await first.controller._rollout.follow_up()
            assert not first.state.tables.num_loading, "a report that comes late orders nothing any more"
        async with running({"expert": {"replicas": 2}}, launcher=launcher, address=address) as second:
            await up(second)
            assert {w: (e.places, e.num_loads) for w, e in launcher.experts.items()} == held
            assert second.tables[-1].version > version
            assert set(launcher.num_starts.values()) == {1}

    run(test())


def test_restart_in_the_middle_of_shrinking_goes_on_with_it() -> None:
    async def test() -> None:
        launcher, address = FakeLauncher(), f"127.0.0.1:{free_port()}"
        async with running(THREE, launcher=launcher, address=address) as first:
            await up(first)
            launcher.readers["decode-0"].reports = False
            request = control_pb2.ScaleRequest(role=control_pb2.ROLE_EXPERT, num_workers=2)
            scaling = asyncio.ensure_future(first.stub.Scale(request))
            await first.until(
                lambda: all(e.scale.num_workers["expert"] == 2 for e in launcher.experts.values())
            )
            await first.crash()
            await asyncio.gather(scaling, return_exceptions=True)
        launcher.readers["decode-0"].reports = True
        async with running(THREE, launcher=launcher, address=address) as second:
            await second.until(lambda: launcher.running() == ["decode-0", "expert-0", "expert-1"])
            await up(second)
            assert second.table_workers() == ["expert-0", "expert-1"]

    run(test())
