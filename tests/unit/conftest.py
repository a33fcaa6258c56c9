"""Unit tests run without Ray, network or sleep: the fixture below makes all three raise."""

import importlib.abc
import importlib.machinery
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

# Before torch is loaded by any test: one thread of arithmetic, as the Makefile sets it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_REPOSITORY = Path(__file__).resolve().parents[2]


class ForbiddenInUnitTest(Exception):
    """A unit test reached for Ray, the network or the clock; it belongs to tests/integration."""


@pytest.fixture(autouse=True)
def no_ray_network_or_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ray.init, connections other than Unix sockets, and time.sleep of our code raise."""
    _forbid_network(monkeypatch)
    monkeypatch.setattr(time, "sleep", _sleep_of_libraries_only(time.sleep))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "ray" in sys.modules:
        _forbid_ray(monkeypatch)
    else:
        monkeypatch.setattr(sys, "meta_path", [_RayImport(monkeypatch), *sys.meta_path])


def _forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise ForbiddenInUnitTest(f"connect to {address} in a unit test")
        real_connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    for module in (grpc, grpc.aio):
        for name in ("insecure_channel", "secure_channel"):
            monkeypatch.setattr(module, name, _unix_only(getattr(module, name)))


def _unix_only(open_channel: Callable[..., Any]) -> Callable[..., Any]:
    def opened(target: str, *args: Any, **kwargs: Any) -> Any:
        if not target.startswith("unix:"):
            raise ForbiddenInUnitTest(f"gRPC channel to {target} in a unit test")
        return open_channel(target, *args, **kwargs)

    return opened


def _sleep_of_libraries_only(real_sleep: Callable[[float], None]) -> Callable[[float], None]:
    """The standard library sleeps by itself, e.g. in subprocess.run(timeout=...); that stays."""

    def sleep(seconds: float) -> None:
        caller = Path(sys._getframe(1).f_code.co_filename)
        if caller.is_relative_to(_REPOSITORY) and ".venv" not in caller.parts:
            raise ForbiddenInUnitTest(f"time.sleep({seconds}) in a unit test, called by {caller.name}")
        real_sleep(seconds)

    return sleep


class _RayImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets a test import ray, for the first time in this process, with ray.init already forbidden."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == "ray" else None
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _forbid_ray(self._monkeypatch)


def _forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*args: Any, **kwargs: Any) -> None:
        raise ForbiddenInUnitTest("ray.init in a unit test")

    monkeypatch.setattr(sys.modules["ray"], "init", init)
