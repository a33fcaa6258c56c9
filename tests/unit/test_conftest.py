"""The fixture of tests/unit/conftest.py forbids what it says, and lets the rest through."""

import asyncio
import socket
import subprocess
import sys
import time

import grpc
import pytest


def test_sleep_of_our_code_raises() -> None:
    with pytest.raises(Exception, match=r"time\.sleep\(1\) in a unit test"):
        time.sleep(1)


def test_sleep_inside_the_standard_library_works() -> None:
    assert subprocess.run([sys.executable, "-c", ""], timeout=60, check=True).returncode == 0


def test_connect_raises() -> None:
    with socket.socket() as client, pytest.raises(Exception, match=r"connect to .* in a unit test"):
        client.connect(("127.0.0.1", 1))


def test_unix_sockets_work() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        assert right.recv(1) == b"x"


def test_grpc_channel_raises() -> None:
    with pytest.raises(Exception, match="gRPC channel to localhost:1 in a unit test"):
        grpc.insecure_channel("localhost:1")


def test_an_event_loop_runs() -> None:
    assert asyncio.run(asyncio.sleep(0, result=7)) == 7


def test_ray_init_raises() -> None:
    import ray

    with pytest.raises(Exception, match=r"ray\.init in a unit test"):
        ray.init()


def test_ray_init_raises_when_ray_was_imported_before() -> None:
    test_ray_init_raises()
