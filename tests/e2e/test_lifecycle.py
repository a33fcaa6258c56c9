"""A cluster comes up, shows itself, mends itself and goes without a trace."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_cluster import BIN, STOP_S, TINY, Running, Shell, end, free_port, pid_of, scrape, wait_until

ROOT = Path(__file__).parents[2]


def check_gone(processes: list[psutil.Process]) -> None:
    """Nothing of a cluster is left; the last helpers of Ray may take a moment."""
    wait_until(
        lambda: not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
        what="every process to end",
        deadline_s=20,
    )


@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
def test_sigterm_ends_everything(start: Callable[..., Running], to_group: bool) -> None:
    running = start()
    processes = running.processes()
    assert len(processes) > 6

    (os.killpg if to_group else os.kill)(running.process.pid, signal.SIGTERM)
    running.process.communicate(timeout=STOP_S)

    assert running.process.returncode == 0
    check_gone(processes)
    assert not Path(running.shell.env["MORAY_STATE_FILE"]).exists()


def test_a_killed_command_takes_its_cluster_along(start: Callable[..., Running]) -> None:
    running = start()
    processes = running.processes()

    running.process.kill()
    running.process.wait(timeout=STOP_S)

    check_gone(processes)


def test_detach_status_down(make_shell: Callable[[], Shell]) -> None:
    shell = make_shell()
    up = shell.run("up", "--config", str(shell.config(TINY)), "--experts", "1", "--detach")
    assert up.returncode == 0, up.stderr
    try:
        members = shell.members()
        assert [m for m in members if m.startswith("expert")] == ["expert-0"]
        assert all(member["is_ready"] for member in members.values())
        assert len(shell.generate([[7, 8]], "--max-tokens", "5")[0]) == 5
    finally:
        down = shell.run("down")
    assert down.returncode == 0, down.stderr
    assert shell.run("status", MORAY_ADDRESS="127.0.0.1:1").returncode == 1


@pytest.mark.parametrize("victim", ["expert-0", "prefill-0", "decode-0", "router-0"])
def test_what_dies_is_started_again_and_answers_the_same(mended: Running, victim: str) -> None:
    prompt = [[11, 12, 13, 14, 15]]
    before = mended.shell.generate(prompt, "--max-tokens", "12")
    started = mended.shell.members()[victim]["incarnation"]

    pid_of(mended, victim).kill()

    wait_until(
        lambda: is_up_again(mended, victim, started), what=f"{victim} to be started again", deadline_s=90
    )
    assert mended.shell.generate(prompt, "--max-tokens", "12") == before


def test_the_controller_can_die_without_anyone_noticing(mended: Running) -> None:
    prompt = [[21, 22, 23]]
    length = ("--max-tokens", "400")
    undisturbed = mended.shell.generate(prompt, *length)
    before = mended.shell.members()
    replays = scrape(before["router-0"]["metrics_address"])["moray_router_replays_total"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(mended.shell.generate, prompt, *length)
        wait_until(lambda: used_pages(before["decode-0"]) > 0, what="the stream to begin")
        pid_of(mended, "controller").kill()
        wait_until(lambda: is_up_again(mended, "controller", before["controller"]["incarnation"]), what="it")
        assert answer.result(timeout=60) == undisturbed
    after = mended.shell.members()
    assert {m: after[m]["incarnation"] for m in after if m != "controller"} == {
        m: before[m]["incarnation"] for m in before if m != "controller"
    }
    assert scrape(after["router-0"]["metrics_address"])["moray_router_replays_total"] == replays
    assert mended.shell.generate(prompt, *length) == undisturbed


def used_pages(member: dict[str, Any]) -> float:
    return scrape(member["metrics_address"])['moray_attention_pages{state="used"}']


@pytest.fixture(scope="module")
def mended(start: Callable[..., Running]) -> Running:
    """A cluster that tests may hurt; its router has fixed ports, so that it comes back where it was."""
    return start({"router": {"grpc_port": free_port(), "http_port": free_port()}})


def is_up_again(running: Running, worker_id: str, started: int) -> bool:
    done = running.shell.run("status", "--json")
    if done.returncode != 0:
        return False
    member = running.shell.members()[worker_id]
    return bool(member["is_ready"] and member["incarnation"] > started)


def test_a_broken_checkpoint_is_refused_before_anything_starts(
    make_shell: Callable[[], Shell], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shell = make_shell()
    made = shell.run("checkpoint", "make", str(tmp_path / "m"))
    assert made.returncode == 0, made.stderr
    (file,) = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    missing = shell.run("up", "--model", str(tmp_path / "m"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file, metadata={"format": "pt"})
    misshapen = shell.run("up", "--model", str(tmp_path / "m"))
    for done in (missing, misshapen):
        assert done.returncode == 1
        assert name in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_refused_before_anything_starts(make_shell: Callable[[], Shell]) -> None:
    shell = make_shell()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        router = {"grpc_port": taken.getsockname()[1], "http_port": 0}
        done = shell.run("up", "--config", str(shell.config(TINY | {"router": router})))
    assert done.returncode == 2
    assert "router.grpc_port" in done.stderr


def test_one_worker_of_role_both_serves_alone(start: Callable[..., Running], mended: Running) -> None:
    alone = {"replicas": 0}
    running = start({"prefill": alone, "decode": alone, "both": {"replicas": 1}})
    prompts = [[31, 32, 33], [34] * 20]
    answers = running.shell.generate(prompts, "--max-tokens", "12")
    assert answers == mended.shell.generate(prompts, "--max-tokens", "12")
    end(running.process)


def test_make_run_once_streams_an_answer(make_shell: Callable[[], Shell]) -> None:
    shell = make_shell()
    config = shell.config({key: value for key, value in TINY.items() if key != "model"})
    done = subprocess.run(
        ["make", "run", "ONCE=1", f"CONFIG={config}"],
        cwd=ROOT,
        env=shell.env | {"PATH": f"{BIN}{os.pathsep}{shell.env['PATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "expert-0, expert-1, prefill-0, decode-0" in done.stdout
    assert "Hello! I am Moray." in done.stdout.split("> Hello, Moray", 1)[1]
