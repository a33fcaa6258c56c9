"""As much of NIXL as a hand-over needs; the only file that knows the package.

NIXL's own thread spins on a core while nothing moves, so there is none: an agent moves bytes only while it is
asked how far it is, also those that others read from it.
"""

import importlib
import importlib.util
import logging
import uuid
from typing import Any

from wire.errors import ConfigError, FrameInvalid
from wire.frames import Array

_PACKAGES = ("nixl_cu13", "nixl_cu12")
"""Either does for memory of the host; neither needs CUDA for it."""
_BACKEND = "UCX"
_MEMORY = "DRAM"
_FIELD = "kv.transport"


class NixlAgent:
    """One end of NIXL; one thread at a time may use it."""

    def __init__(self, worker_id: str) -> None:
        """Starts the agent, under a name that no other one has.

        Raises:
            ConfigError: the package is missing or cannot start.
        """
        package = _load()
        # A worker that comes back under its id is another agent: what was known of the old one is of no use.
        self.name = f"{worker_id}-{uuid.uuid4().hex[:12]}"
        try:
            config = package.nixl_agent_config(backends=[_BACKEND], enable_prog_thread=False)
            self._agent: Any = package.nixl_agent(self.name, config)
        except Exception as error:  # the package's errors have no base of their own
            raise _no_agent(f"{type(error).__name__}: {error}") from error
        if _BACKEND not in self._agent.backends:
            raise _no_agent(f"no {_BACKEND} among its backends")
        self._registered: list[Any] = []

    def register(self, area: Array) -> None:
        """Makes memory readable for others, or a place to read to.

        Raises:
            ConfigError: it cannot be registered.
        """
        region = (area.ctypes.data, area.nbytes, 0, "")
        try:
            self._registered.append(self._agent.register_memory([region], _MEMORY))
        except Exception as error:  # as above
            raise _no_agent(f"{area.nbytes} bytes cannot be registered ({error})") from error

    def metadata(self) -> bytes:
        """What another agent must know to read what is registered here."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def add_peer(self, metadata: bytes) -> str:
        """Gets to know another agent; returns its name.

        Raises:
            FrameInvalid: the metadata is damaged, or of an agent that cannot be reached.
        """
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:  # as above
            raise _unread(f"its agent cannot be reached ({type(error).__name__})") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget_peer(self, name: str) -> None:
        """Forgets another agent, which may be gone."""
        try:
            self._agent.remove_remote_agent(name)
        except Exception:  # noqa: BLE001  as above; what is forgotten may fail as it likes
            logging.getLogger(__name__).debug("agent %s was not known", name)

    def begin_read(self, name: str, *, address: int, to_address: int, num_bytes: int, message: bytes) -> Any:
        """Begins to read another agent's memory, which is told `message` at the end; returns the read.

        Raises:
            FrameInvalid: the other agent has no such memory, or is gone.
        """
        try:
            descriptors = self._agent.get_xfer_descs
            read = self._agent.initialize_xfer(
                "READ",
                descriptors([(to_address, num_bytes, 0)], _MEMORY),
                descriptors([(address, num_bytes, 0)], _MEMORY),
                name,
                message,
            )
            self._agent.transfer(read)
        except Exception as error:  # as above
            raise _unread(f"{num_bytes} bytes at {name} ({type(error).__name__})") from error
        return read

    def is_read(self, read: Any) -> bool:
        """Whether a read is over, and its bytes are here; moves it on.

        Raises:
            FrameInvalid: it failed.
        """
        try:
            state = self._agent.check_xfer_state(read)
        except Exception as error:  # as above
            raise _unread(type(error).__name__) from error
        if state not in ("DONE", "PROC"):
            raise _unread(f"state {state}")
        return bool(state == "DONE")

    def end_read(self, read: Any) -> None:
        """Frees what a read needed; it is over."""
        try:
            self._agent.release_xfer_handle(read)
        except Exception as error:  # noqa: BLE001  as above; the agent frees it when it closes
            logging.getLogger(__name__).warning("a read could not be freed: %s", error)

    def take_messages(self) -> list[bytes]:
        """What others said since the last time; moves on what they read here."""
        said: dict[Any, list[bytes]] = self._agent.get_new_notifs()
        return [message for messages in said.values() for message in messages]

    def close(self) -> None:
        """Gives the registered memory back."""
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()
        del self._agent


def check_installed() -> None:
    """Looks for the package without loading it.

    Raises:
        ConfigError: it is not there.
    """
    if not any(importlib.util.find_spec(name) for name in _PACKAGES):
        raise _not_found()


def _load() -> Any:
    for name in _PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError:
            continue
        # It tells of every agent on stdout, where Moray's JSON lines go.
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return package
    raise _not_found()


def _not_found() -> ConfigError:
    return _no_agent(f"none of the modules {', '.join(_PACKAGES)} can be imported")


def _no_agent(why: str) -> ConfigError:
    return ConfigError(
        field=_FIELD,
        wanted="an agent of NIXL for 'nixl'",
        given=why,
        hint="install it in every attention worker (pip install 'moray[nixl]') or set it to 'grpc'",
    )


def _unread(what: str) -> FrameInvalid:
    return FrameInvalid(f"rows could not be read over NIXL: {what}", field="unread")
