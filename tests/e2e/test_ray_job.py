"""Moray inside a Ray cluster that runs already: `ray job submit`, RAY_ADDRESS, and leaving it clean."""

import json
import subprocess
from collections.abc import Callable

from e2e_cluster import BIN, START_S, TINY, RayHead, Shell, free_port, wait_until


def ray_job(head: RayHead, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """One `ray job` command, as a user types it."""
    command, *rest = arguments
    return subprocess.run(
        [str(BIN / "ray"), "job", command, "--address", head.dashboard, *rest],
        env=head.shell.env,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def job_status(head: RayHead, job_id: str) -> str:
    return ray_job(head, "status", job_id).stdout.lower()


def actors(head: RayHead) -> list[dict[str, str]]:
    """Live actors in the Ray cluster."""
    command = [str(BIN / "ray"), "list", "actors", "--address", head.dashboard, "--format", "json"]
    command += ["--filter", "state=ALIVE"]
    done = subprocess.run(command, env=head.shell.env, capture_output=True, text=True, timeout=60, check=True)
    if "No resource" in done.stdout:
        return []
    found: list[dict[str, str]] = json.loads(done.stdout)
    return [
        actor for actor in found if actor["class_name"] in ("WorkerActor", "RouterActor", "ControllerActor")
    ]


def test_ray_job_submit_starts_a_cluster_and_stop_ends_it(
    ray_head: RayHead, make_shell: Callable[[], Shell]
) -> None:
    shell = make_shell()
    grpc_port = free_port()
    values = TINY | {"name": "submitted", "router": {"grpc_port": grpc_port, "http_port": 0}}
    submit = ray_job(
        ray_head, "submit", "--no-wait", "--submission-id", "moray-up", "--", "moray", "up",
        "--config", str(shell.config(values)),
    )  # fmt: skip
    assert submit.returncode == 0, submit.stderr
    address = {"MORAY_ADDRESS": f"127.0.0.1:{grpc_port}"}
    try:
        wait_until(
            lambda: "Ctrl-C" in ray_job(ray_head, "logs", "moray-up").stdout,
            what="the job",
            deadline_s=START_S,
        )
        assert len(shell.generate([[3, 4, 5]], "--max-tokens", "6", **address)[0]) == 6
    finally:
        ray_job(ray_head, "stop", "moray-up")
    wait_until(lambda: "stopped" in job_status(ray_head, "moray-up"), what="the job to stop")
    wait_until(lambda: not actors(ray_head), what="its actors to end")


def test_up_detached_in_ray_lives_on_until_down(ray_head: RayHead, make_shell: Callable[[], Shell]) -> None:
    shell = make_shell()
    config = str(shell.config(TINY | {"name": "detached"}))
    up = shell.run("up", "--config", config, "--detach", **ray_head.joined)
    assert up.returncode == 0, up.stderr
    again = shell.run("up", "--config", config, **ray_head.joined)
    assert len(shell.generate([[3, 4, 5]], "--max-tokens", "6")[0]) == 6
    assert shell.run("down").returncode == 0
    assert again.returncode == 2
    assert "detached" in again.stderr
    wait_until(lambda: not actors(ray_head), what="its actors to end")


def test_an_address_without_ray_is_refused_clearly(make_shell: Callable[[], Shell]) -> None:
    shell = make_shell()
    done = shell.run("up", "--config", str(shell.config(TINY)), RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 1
    assert "RAY_ADDRESS=127.0.0.1:1" in done.stderr.splitlines()[-1]
