"""An attention worker's end of NIXL: a thread that reads rows of others, and hears when its own were read.

The thread is the only one that uses the agent. It sleeps in short, growing steps while something moves, and
wakes ten times a second otherwise, so that a read which nobody waits for any more comes to its end, too.
"""

import logging
import queue
import struct
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from wire.errors import FrameInvalid
from wire.frames import Array
from workers.attention.byte_ranges import ByteRanges
from workers.attention.kv_transfer import Place
from workers.attention.nixl_agent import NixlAgent
from workers.config import KvConfig

_log = logging.getLogger(__name__)

_SHORTEST_S = 0.00005
_LONGEST_S = 0.002
_IDLE_S = 0.1
_TICKET = struct.Struct("<Q")


@dataclass
class _Read:
    """Rows that were asked for; the thread is the only one that changes it."""

    place: Place
    num_bytes: int
    result: "Future[Array]"
    handle: Any = None
    begin: int = 0
    """In the landing area, once there is a handle."""


@dataclass(frozen=True)
class _Watch:
    """A piece of the staging area that another worker is to read."""

    ticket: int
    result: "Future[None]"


class NixlLink:
    """Reads and is read, until it is closed."""

    def __init__(self, agent: NixlAgent, *, area_bytes: int) -> None:
        """Registers the areas.

        Args:
            agent: used by nobody else from here on.
            area_bytes: of each of the two areas: what leaves and what comes.

        Raises:
            ConfigError: memory cannot be registered.
        """
        self.staging = np.empty(area_bytes, dtype=np.uint8)
        """Registered; what others read from here. The stage is the only one that writes it."""
        self._landing = np.empty(area_bytes, dtype=np.uint8)
        self._room = ByteRanges(area_bytes)
        self._agent = agent
        agent.register(self.staging)
        agent.register(self._landing)
        self.name = agent.name
        self.metadata = agent.metadata()
        """What another agent must know of this one."""
        # Not a SimpleQueue: its `get` may wait for ever when its timeout ends as it wakes (CPython 3.11).
        self._commands: queue.Queue[_Read | _Watch | None] = queue.Queue()
        self._waiting: deque[_Read] = deque()
        self._running: list[_Read] = []
        self._watched: dict[int, Future[None]] = {}
        self._known: set[str] = set()
        """Agents that may be read from."""
        self._doubtful: set[str] = set()
        """Agents to forget as soon as nothing is read from them."""
        self._is_open = True
        """Written by the thread, once; read by all."""
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    @property
    def area_bytes(self) -> int:
        """What can be read, or left to be read, at a time; 0 = the link is closed or broken."""
        return self.staging.nbytes if self._is_open else 0

    def read(self, place: Place, num_bytes: int) -> "Future[Array]":
        """The bytes (num_bytes,) uint8 that another worker left; fails with FrameInvalid."""
        read = _Read(place, num_bytes, Future())
        self._commands.put(read)
        return read.result

    def watch(self, ticket: int) -> "Future[None]":
        """Resolves when another worker has read what it got under this ticket; cancel it to stop waiting."""
        watch = _Watch(ticket, Future())
        self._commands.put(watch)
        return watch.result

    def close(self) -> None:
        """Ends the thread and gives the memory back; what was not read fails."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        delay_s = _IDLE_S
        try:
            while (command := self._next(delay_s)) is not None:
                has_moved = self._accept(command) or self._step()
                is_busy = bool(self._running or self._waiting or self._watched)
                longest_s = _LONGEST_S if is_busy else _IDLE_S
                delay_s = _SHORTEST_S if has_moved else min(2 * delay_s, longest_s)
        except Exception:  # noqa: BLE001  logged, and the pulls go on in plain frames
            _log.exception("NIXL is given up: rows go in plain frames from here on")
        finally:
            self._end()

    def _next(self, delay_s: float) -> "_Read | _Watch | bool | None":
        """A command, None at the end, False where there was none for so long."""
        try:
            return self._commands.get(timeout=delay_s)
        except queue.Empty:
            return False

    def _accept(self, command: "_Read | _Watch | bool") -> bool:
        if isinstance(command, _Read):
            self._waiting.append(command)
            self._step()
        elif isinstance(command, _Watch):
            self._watched[command.ticket] = command.result
        return command is not False

    def _step(self) -> bool:
        """Moves everything on; whether anything began or ended."""
        num_running = len(self._running)
        has_begun = self._begin_reads()
        self._running = [read for read in self._running if not self._has_ended(read)]
        for name in self._doubtful - {read.place.agent for read in self._running}:
            self._agent.forget_peer(name)
            self._known.discard(name)
            self._doubtful.discard(name)
        has_heard = self._hear()
        return has_begun or has_heard or len(self._running) < num_running

    def _begin_reads(self) -> bool:
        """Begins what there is room for, in the order of asking."""
        has_begun = False
        while self._waiting:
            read = self._waiting[0]
            if read.result.cancelled():
                self._waiting.popleft()
                continue
            begin = self._room.lend(read.num_bytes)
            if begin is None and read.num_bytes <= self._landing.nbytes:
                break
            self._waiting.popleft()
            has_begun = True
            if begin is None:
                what = f"{read.num_bytes} bytes of rows at once, at most {self._landing.nbytes} are taken"
                _fail(read.result, FrameInvalid(what, field="rows"))
                continue
            read.begin = begin
            self._begin(read)
        return has_begun

    def _begin(self, read: _Read) -> None:
        place = read.place
        try:
            self._meet(place)
            read.handle = self._agent.begin_read(
                place.agent,
                address=place.address,
                to_address=self._landing.ctypes.data + read.begin,
                num_bytes=read.num_bytes,
                message=_TICKET.pack(place.ticket),
            )
        except FrameInvalid as error:
            self._doubtful.add(place.agent)
            self._room.give_back(read.begin)
            _fail(read.result, error)
        else:
            self._running.append(read)

    def _meet(self, place: Place) -> None:
        if place.agent not in self._known and place.agent_metadata:
            self._known.add(self._agent.add_peer(place.agent_metadata))
        if place.agent not in self._known or place.agent in self._doubtful:
            raise FrameInvalid(f"rows lie at agent {place.agent!r}, which is not known here", field="unread")

    def _has_ended(self, read: _Read) -> bool:
        """Whether it is over: a read that nobody waits for any more keeps its bytes until it is."""
        try:
            if not self._agent.is_read(read.handle):
                return False
            data = self._landing[read.begin : read.begin + read.num_bytes].copy()
            if read.result.set_running_or_notify_cancel():
                read.result.set_result(data)
        except FrameInvalid as error:
            self._doubtful.add(read.place.agent)
            _fail(read.result, error)
        self._agent.end_read(read.handle)
        self._room.give_back(read.begin)
        return True

    def _hear(self) -> bool:
        messages = self._agent.take_messages()
        for message in messages:
            if len(message) == _TICKET.size:
                (ticket,) = _TICKET.unpack(message)
                result = self._watched.pop(ticket, None)
                if result is not None and result.set_running_or_notify_cancel():
                    result.set_result(None)
        for ticket in [t for t, result in self._watched.items() if result.cancelled()]:
            del self._watched[ticket]
        return bool(messages)

    def _end(self) -> None:
        self._is_open = False
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                self._accept_last(command)
        for read in (*self._waiting, *self._running):
            _fail(read.result, FrameInvalid("NIXL was closed before the rows were read", field="unread"))
        for result in self._watched.values():
            result.cancel()
        self._agent.close()

    def _accept_last(self, command: "_Read | _Watch") -> None:
        if isinstance(command, _Read):
            self._waiting.append(command)
        else:
            self._watched[command.ticket] = command.result


def open_link(worker_id: str, config: KvConfig) -> NixlLink | None:
    """A worker's end of NIXL, if the config wants one.

    Raises:
        ConfigError: it cannot start; says what to install.
    """
    if config.transport != "nixl":
        return None
    return NixlLink(NixlAgent(worker_id), area_bytes=config.nixl_bytes)


def _fail(result: "Future[Any]", error: FrameInvalid) -> None:
    if not result.done() and result.set_running_or_notify_cancel():
        result.set_exception(error)
