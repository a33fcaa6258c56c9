"""A worker's end of NIXL over an agent that copies memory when the test lets it."""

import ctypes
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from wire.errors import ConfigError, FrameInvalid
from workers.attention.kv_transfer import Place
from workers.attention.nixl_link import NixlLink, open_link
from workers.config import KvConfig

LIMIT_S = 20
AREA_BYTES = 256


class FakeAgent:
    """Reads memory of this process while `is_moving` is set; knows agents whose metadata is their name."""

    name = "here"

    def __init__(self) -> None:
        self.is_moving = threading.Event()
        self.error: FrameInvalid | None = None
        self.messages: list[bytes] = []
        self.forgotten: list[str] = []
        self.begun: list[int] = []
        self.num_open = 0
        self.is_closed = False

    def register(self, area: Any) -> None:
        pass

    def metadata(self) -> bytes:
        return b"here"

    def add_peer(self, metadata: bytes) -> str:
        return metadata.decode()

    def forget_peer(self, name: str) -> None:
        self.forgotten.append(name)

    def begin_read(self, name: str, *, address: int, to_address: int, num_bytes: int, message: bytes) -> Any:
        self.begun.append(num_bytes)
        self.num_open += 1
        return (to_address, address, num_bytes, message)

    def is_read(self, read: Any) -> bool:
        if self.error is not None:
            raise self.error
        if self.is_moving.is_set():
            ctypes.memmove(*read[:3])
            self.messages.append(read[3])
        return self.is_moving.is_set()

    def end_read(self, read: Any) -> None:
        self.num_open -= 1

    def take_messages(self) -> list[bytes]:
        messages, self.messages = self.messages, []
        return messages

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


@pytest.fixture
def link(agent: FakeAgent) -> Iterator[NixlLink]:
    link = NixlLink(agent, area_bytes=AREA_BYTES)
    yield link
    link.close()
    assert agent.is_closed
    assert agent.num_open == len(link._running)


def place(link: NixlLink, ticket: int = 1, **fields: Any) -> Place:
    """The beginning of the link's own stage."""
    base = {"agent": "there", "agent_metadata": b"there", "address": link.staging.ctypes.data, "checksum": 0}
    return Place(**{**base, **fields}, ticket=ticket)


def problem(result: "Future[Any]") -> str:
    error = result.exception(timeout=LIMIT_S)
    assert isinstance(error, FrameInvalid)
    return error.field


def test_rows_are_read_and_their_owner_hears_of_it(link: NixlLink, agent: FakeAgent) -> None:
    link.staging[:] = np.arange(AREA_BYTES, dtype=np.uint8)
    heard = [link.watch(ticket) for ticket in (1, 2)]
    agent.is_moving.set()
    data = link.read(place(link, ticket=2), 100).result(timeout=LIMIT_S)
    np.testing.assert_array_equal(data, np.arange(100))
    heard[1].result(timeout=LIMIT_S)
    assert not heard[0].done()


def test_messages_that_say_nothing_are_passed_over(link: NixlLink, agent: FakeAgent) -> None:
    heard = link.watch(1)
    agent.messages = [b"", b"what?", bytes(8), (1).to_bytes(8, "little")]
    heard.result(timeout=LIMIT_S)


def test_reads_without_room_wait_for_it(link: NixlLink, agent: FakeAgent) -> None:
    reads = [link.read(place(link), num_bytes) for num_bytes in (200, 100, 10)]
    agent.is_moving.set()
    assert [read.result(timeout=LIMIT_S).nbytes for read in reads] == [200, 100, 10]
    assert agent.begun == [200, 100, 10]


def test_read_that_nobody_waits_for_keeps_its_bytes_until_it_is_over(
    link: NixlLink, agent: FakeAgent
) -> None:
    first = link.read(place(link), 200)
    second = link.read(place(link), 100)
    third = link.read(place(link), 50)
    first.cancel()
    third.cancel()
    agent.is_moving.set()
    assert second.result(timeout=LIMIT_S).nbytes == 100
    assert agent.begun in ([200, 100], [100])


def test_failed_read_makes_its_agent_unknown_until_it_is_introduced_again(
    link: NixlLink, agent: FakeAgent
) -> None:
    agent.error = FrameInvalid("gone", field="unread")
    assert problem(link.read(place(link), 10)) == "unread"
    agent.error = None
    agent.is_moving.set()
    assert problem(link.read(place(link, agent_metadata=b""), 10)) == "unread"
    assert agent.forgotten[0] == "there"
    assert link.read(place(link), 10).result(timeout=LIMIT_S).nbytes == 10


@pytest.mark.parametrize(
    ("fields", "num_bytes", "reason"),
    [
        ({"agent_metadata": b""}, 10, "unread"),
        ({"agent_metadata": b"another"}, 10, "unread"),
        ({}, AREA_BYTES + 1, "rows"),
    ],
)
def test_what_cannot_be_read_is_refused(
    fields: dict[str, Any], num_bytes: int, reason: str, link: NixlLink
) -> None:
    assert problem(link.read(place(link, **fields), num_bytes)) == reason


def test_closed_link_fails_what_was_not_read() -> None:
    link = NixlLink(FakeAgent(), area_bytes=AREA_BYTES)
    reads = [link.read(place(link), 200), link.read(place(link), 200)]
    watch = link.watch(1)
    assert link.area_bytes == AREA_BYTES
    link.close()
    assert [problem(read) for read in reads] == ["unread", "unread"]
    assert watch.cancelled()
    assert link.area_bytes == 0


def test_config_without_nixl_opens_no_link() -> None:
    assert open_link("prefill-0", KvConfig()) is None


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ConfigError, match=r"'kv.transport'.*nixl_cu12.*pip install 'moray\[nixl\]'"
    ) as caught:
        open_link("prefill-0", KvConfig(transport="nixl"))
    assert caught.value.field == "kv.transport"
