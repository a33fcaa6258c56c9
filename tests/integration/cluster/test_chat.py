"""`moray chat` and `moray generate --chat` against a router that plays fixed replies."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from wire.errors import Overloaded
from wire.proto import inference_pb2, inference_pb2_grpc
from wire.rpc import abort_with

CALL = (
    'I compute.</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="calculator">\n'
    '<｜DSML｜parameter name="expression" string="true">6 * 7</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
ANSWER = "The tool says 42.</think>It is 42."


class Player(inference_pb2_grpc.InferenceServicer):
    """Streams the next reply of a list, three characters a message; notes what it was asked."""

    def __init__(self) -> None:
        self.replies: list[str | None] = []
        self.prompts: list[str] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.prompts.append(request.text)
        text = self.replies.pop(0)
        if text is None:
            await abort_with(context, Overloaded("no room"))
            return
        for start in range(0, len(text), 3):
            yield inference_pb2.GenerateResponse(text=text[start : start + 3], token_ids=[7])


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Player]:
    """A router on a Unix socket, in a thread of its own."""
    playing, started, loop = Player(), threading.Event(), asyncio.new_event_loop()
    address = f"unix:{tmp_path}/router.sock"
    stopped = asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(playing, server)
        server.add_insecure_port(address)
        await server.start()
        started.set()
        await stopped.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    monkeypatch.setenv("MORAY_ADDRESS", address)
    yield playing
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


def moray(*arguments: str, typed: str = "") -> Any:
    return CliRunner().invoke(app, [*arguments], input=typed)


def test_chat_runs_the_tool_and_sends_its_result_back(player: Player) -> None:
    player.replies = [CALL, ANSWER]
    ran = moray("chat", "What is 6 * 7?")
    assert ran.exit_code == 0
    assert '→ calculator {"expression": "6 * 7"}' in ran.stdout
    assert "← 42" in ran.stdout
    assert "It is 42." in ran.stdout
    first, second = player.prompts
    assert '{"name": "calculator"' in first
    assert first.endswith("<｜User｜>What is 6 * 7?<｜Assistant｜><think>")
    assert second.endswith("<result>42</result>\n</function_results>\n\n<think>")


def test_each_line_of_stdin_is_a_turn_and_a_failed_one_is_forgotten(player: Player) -> None:
    player.replies = ["r</think>Hello!", None, "r</think>Bye!"]
    ran = moray("chat", "--no-tools", typed="hi\nlost\nbye\n")
    assert ran.exit_code == 0
    assert "Hello!" in ran.stdout
    assert "no room" in ran.stderr
    assert "lost" not in player.prompts[2]
    assert "Hello!" in player.prompts[2]


def test_malformed_call_is_shown_and_the_chat_goes_on(player: Player) -> None:
    player.replies = [CALL[:-40], "r</think>ok"]
    ran = moray("chat", typed="one\ntwo\n")
    assert "not readable" in ran.stdout
    assert "6 * 7" in ran.stdout
    assert ran.stdout.rstrip().endswith("ok")


def test_calls_without_end_are_given_up(player: Player) -> None:
    player.replies = [CALL] * 3
    ran = moray("chat", "--max-tool-rounds", "2", "?")
    assert "gave up after 2 rounds" in ran.stdout
    assert len(player.prompts) == 3


def test_functions_of_a_file_are_the_tools(player: Player, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def calculator(expression: str) -> str:\n    return 'mine ' + expression\n"
    )
    player.replies = [CALL, ANSWER]
    assert "← mine 6 * 7" in moray("chat", "--tools", str(tmp_path / "mine.py"), "?").stdout


def test_generate_with_chat_encodes_the_text_and_splits_the_reply(player: Player) -> None:
    player.replies = ["<b>Hi</b>"]
    ran = moray("generate", "--chat", "--no-thinking", "--system", "Be kind.", "Hello")
    assert ran.stdout == "<b>Hi</b>\n"
    assert player.prompts == ["<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hello<｜Assistant｜></think>"]


def test_chat_without_a_router_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MORAY_ADDRESS", f"unix:{tmp_path}/nobody.sock")
    assert moray("chat", "hi").exit_code != 0


def test_generate_refuses_chat_with_token_ids(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"tokens": [[1]]}')
    ran = moray("generate", "--chat", "--tokens", str(tmp_path / "t.json"), "--address", "localhost:1")
    assert "--chat" in str(ran.exception)
