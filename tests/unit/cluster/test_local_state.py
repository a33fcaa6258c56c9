"""The note about the newest cluster of this user, and where requests go."""

from pathlib import Path

import pytest

from cluster.local_state import (
    DEFAULT_ADDRESS,
    LocalCluster,
    forget_local_cluster,
    load_local_cluster,
    router_address,
    save_local_cluster,
    state_file,
)

CLUSTER = LocalCluster(router_address="10.0.0.1:50051", controller_address="10.0.0.1:6390", pid=77)
OTHER = LocalCluster(router_address="10.0.0.2:50051", controller_address="10.0.0.2:6390", pid=0)


@pytest.fixture(autouse=True)
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The note of this test; its folder is not there yet."""
    monkeypatch.delenv("MORAY_ADDRESS", raising=False)
    path = tmp_path / "deep" / "cluster.json"
    monkeypatch.setenv("MORAY_STATE_FILE", str(path))
    return path


def test_saved_cluster_is_loaded() -> None:
    save_local_cluster(CLUSTER)
    assert load_local_cluster() == CLUSTER


def test_newest_cluster_replaces_the_one_before(note: Path) -> None:
    save_local_cluster(CLUSTER)
    save_local_cluster(OTHER)
    assert load_local_cluster() == OTHER
    assert list(note.parent.iterdir()) == [note]


def test_nothing_is_noted_at_first() -> None:
    assert load_local_cluster() is None


def test_forgotten_cluster_is_gone(note: Path) -> None:
    save_local_cluster(CLUSTER)
    forget_local_cluster(CLUSTER)
    assert load_local_cluster() is None
    assert not note.exists()


def test_forgetting_leaves_a_newer_cluster_alone() -> None:
    save_local_cluster(OTHER)
    forget_local_cluster(CLUSTER)
    assert load_local_cluster() == OTHER


def test_forgetting_twice_is_no_error() -> None:
    save_local_cluster(CLUSTER)
    forget_local_cluster(CLUSTER)
    forget_local_cluster(CLUSTER)
    assert load_local_cluster() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b'{"pid": 1, "extra": 2}', b"\xff\xfe"])
def test_broken_note_is_no_cluster(note: Path, content: bytes) -> None:
    note.parent.mkdir()
    note.write_bytes(content)
    assert load_local_cluster() is None
    assert router_address(None) == DEFAULT_ADDRESS


def test_broken_note_is_replaced(note: Path) -> None:
    note.parent.mkdir()
    note.write_text("{")
    save_local_cluster(CLUSTER)
    assert load_local_cluster() == CLUSTER


def test_address_is_the_default_when_nothing_says_otherwise() -> None:
    assert router_address(None) == "127.0.0.1:50051"


def test_noted_address_comes_before_the_default() -> None:
    save_local_cluster(CLUSTER)
    assert router_address(None) == CLUSTER.router_address


def test_environment_comes_before_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    save_local_cluster(CLUSTER)
    monkeypatch.setenv("MORAY_ADDRESS", "router:1")
    assert router_address(None) == "router:1"


def test_flag_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    save_local_cluster(CLUSTER)
    monkeypatch.setenv("MORAY_ADDRESS", "router:1")
    assert router_address("flag:2") == "flag:2"


def test_cluster_without_a_router_of_its_own_gives_the_default() -> None:
    save_local_cluster(LocalCluster(router_address="", controller_address="10.0.0.1:6390", pid=0))
    assert router_address(None) == DEFAULT_ADDRESS


def test_file_is_in_the_state_directory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORAY_STATE_FILE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_file() == tmp_path / "xdg" / "moray" / "cluster.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_file() == tmp_path / "home" / ".local" / "state" / "moray" / "cluster.json"
