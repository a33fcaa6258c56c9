"""`moray up` and `moray down`: start a cluster here or in RAY_ADDRESS, keep it, end it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.chat.conversation import Conversation
from cluster.cli.dtype import DtypeName
from cluster.cli.failure import report
from cluster.cli.generate import print_reply
from cluster.client import GenerateOptions, shut_down
from cluster.config import MorayConfig, load_config
from cluster.local_state import (
    LocalCluster,
    controller_address,
    forget_local_cluster,
    load_local_cluster,
    save_local_cluster,
    state_file,
)
from cluster.supervise import SIGNALS, run_in_own_session
from wire.errors import MorayError, NotReady

if TYPE_CHECKING:
    from cluster.lifecycle import Cluster

_PROMPT_TOKENS = 128
_POLL_S = 0.5


class _Stopping(Exception):
    """Somebody wants the cluster to end: SIGTERM or Ctrl-C."""


def up(  # noqa: PLR0913, PLR0917 - one parameter a flag
    config: Annotated[Path | None, typer.Option(help="YAML config file.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint directory, or a model in the box.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Expert workers.")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Form of the weights in memory.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready; it runs on.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Ask this when ready and print the answer.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when the prompt is answered.")] = False,
) -> None:
    """Starts a cluster on this host, or in the Ray cluster at RAY_ADDRESS, and keeps it until Ctrl-C."""
    overrides = {
        "model": model,
        "expert.replicas": experts,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "compute.dtype": dtype,
    }
    settings = load_config(config, overrides=overrides)
    settings.check_serves()
    if detach and not os.environ.get("RAY_ADDRESS"):
        _detach()
        return
    if detach:
        _run(settings, prompt=prompt, once=once, detach=True)
        return
    raise typer.Exit(run_in_own_session(lambda: _run_reporting(settings, prompt=prompt, once=once)))


def down(
    controller: Annotated[str | None, typer.Option(help="host:port; else the newest here.")] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds to wait for the end.")] = 120.0,
) -> None:
    """Ends a cluster: running requests finish first (router.drain_s)."""
    noted = load_local_cluster()
    address = controller_address(controller)
    with Console(stderr=True).status("stopping"):
        asyncio.run(shut_down(address, deadline_s=deadline_s))
        if noted and noted.controller_address == address:
            _wait_gone(noted.pid, deadline_s=deadline_s)
            forget_local_cluster(noted)
    Console().print("stopped")


def _run_reporting(settings: MorayConfig, *, prompt: str | None, once: bool) -> int:
    """Runs the cluster in this process; errors become a line and an exit code, as at the top level."""
    try:
        _run(settings, prompt=prompt, once=once, detach=False)
    except MorayError as error:
        return report(error)
    return 0


def _run(settings: MorayConfig, *, prompt: str | None, once: bool, detach: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    stop = _watch_signals()
    with console.status("checking the model"):
        # Imported here: Ray and torch take seconds to load.
        from cluster.lifecycle import check_model, start_cluster

        model = check_model(settings)
    with console.status("starting Ray"):
        cluster = start_cluster(settings, model)
    # Ray installed handlers of its own.
    _watch_signals(stop)
    noted = None
    leave_running = False
    try:
        noted = _wait_ready(cluster, settings, console, stop)
        save_local_cluster(noted if not detach else replace(noted, pid=0))
        if prompt is not None and noted.router_address:
            console.print(f"> {prompt}", markup=False)
            _answer(noted.router_address, prompt, stop, once=once)
        leave_running = detach
        if not once and not detach:
            console.print("Ctrl-C or `moray down` stops it")
            while not cluster.wait_ended(timeout_s=_POLL_S):
                _check(stop)
            console.print("ended")
    except _Stopping:
        console.print("stopping")
    finally:
        if not leave_running:
            cluster.stop()
            if noted is not None:
                forget_local_cluster(noted)


def _watch_signals(stop: threading.Event | None = None) -> threading.Event:
    """An event that is set by the first SIGTERM or SIGINT.

    A flag and not an exception: one raised inside a call into Ray would be lost there.
    """
    event = stop or threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda _number, _frame: event.set())
    return event


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopping


def _answer(address: str, prompt: str, stop: threading.Event, *, once: bool) -> None:
    """Asks the prompt; a cluster that is to stay stays, even if it refuses (a model without tokenizer)."""
    try:
        asyncio.run(_ask(address, prompt, stop))
    except MorayError as error:
        if once:
            raise
        report(error)


async def _ask(address: str, prompt: str, stop: threading.Event) -> None:
    """Prints the answer to a prompt, unless somebody wants to stop first."""
    conversation = Conversation(thinking_mode="thinking")
    conversation.ask(prompt)
    options = GenerateOptions(max_tokens=_PROMPT_TOKENS)
    answer = asyncio.create_task(print_reply(address, conversation, options))
    while not answer.done() and not stop.is_set():
        await asyncio.wait([answer], timeout=_POLL_S)
    if not answer.done():
        answer.cancel()
        raise _Stopping
    answer.result()


def _wait_ready(
    cluster: "Cluster", settings: MorayConfig, console: Console, stop: threading.Event
) -> LocalCluster:
    """Shows progress until every member is ready; notes where the cluster is."""
    with console.status("starting") as spinner:

        def show(waiting_for: str) -> None:
            _check(stop)
            spinner.update(f"waiting for {waiting_for}")

        status = cluster.wait_ready(deadline_s=settings.controller.start_s, on_progress=show)
    router_address = status.addresses.get("router-0", "")
    noted = LocalCluster(
        router_address=router_address, controller_address=cluster.controller_address, pid=os.getppid()
    )
    workers = ", ".join(worker_id for worker_id in status.addresses if worker_id != "controller")
    console.print(f"ready: {workers}")
    if router_address:
        console.print(f"gRPC (moray.v1.Inference, with reflection): {router_address}")
        console.print("try: moray chat, or moray generate 'Once there was a cat'")
    else:
        console.print(f"controller for routers: {cluster.controller_address}")
    return noted


def _detach() -> None:
    """Runs this command again in the background and waits until it is ready or has failed."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = state_file().with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.argv[0], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    console = Console(highlight=False, soft_wrap=True)
    with console.status("starting in the background"):
        while (noted := load_local_cluster()) is None or noted.pid != child.pid:
            if child.poll() is not None:
                raise NotReady(f"it ended with code {child.returncode}; {log} ends with: {_last_line(log)}")
            time.sleep(0.2)
    console.print(f"ready: {noted.router_address}, process {child.pid}, log {log}; `moray down` stops it")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing)"


def _wait_gone(pid: int, *, deadline_s: float) -> None:
    """Waits until the process that held the cluster has ended too."""
    ends_s = time.monotonic() + deadline_s
    while pid and time.monotonic() < ends_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    if pid:
        raise MorayError(f"process {pid} is still there after {deadline_s:g} s")
