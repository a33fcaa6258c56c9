"""Cold pages: within their bytes, the longest unused go first, and a changed byte is seen."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.cold_pages import ColdPage, HostPages, sum_bytes
from workers.attention.disk_pages import DiskPages

PAGE_BYTES = 2 * 4 * 3 * 4


def cold(value: float) -> ColdPage:
    rows_LTB = np.full((2, 4, 3), value, np.float32)
    return ColdPage(rows_LTB, sum_bytes(rows_LTB))


def name(idx: int) -> bytes:
    return bytes([idx]) * 16


@given(
    room=st.integers(0, 4),
    calls=st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 6)), max_size=40),
)
def test_memory_keeps_the_pages_used_last(room: int, calls: list[tuple[str, int]]) -> None:
    host, recent = HostPages(room * PAGE_BYTES + 5), []
    for what, idx in calls:
        if what == "put" and idx not in recent:
            recent.append(idx)
            pushed_out = [digest for digest, _ in host.put(name(idx), cold(idx))]
            assert pushed_out == [name(i) for i in recent[: -room or None]][: len(pushed_out)]
            recent = recent[len(pushed_out) :]
        elif what == "get":
            found = host.get(name(idx))
            assert (found is not None) == (idx in recent)
            if idx in recent:
                recent.append(recent.pop(recent.index(idx)))
        elif what == "drop":
            host.drop(name(idx))
            recent = [i for i in recent if i != idx]
        host.check_integrity()
        assert len(host) == len(recent) <= room


def test_changed_byte_is_seen() -> None:
    page = cold(1.5)
    assert page.is_whole
    page.rows_LTB[1, 2, 0] += 1
    assert not page.is_whole


def test_files_keep_the_pages_used_last(tmp_path: Path) -> None:
    disk = DiskPages(tmp_path, 3 * PAGE_BYTES)
    for idx in range(3):
        disk.write(name(idx), cold(idx))
    found = disk.read(name(0), cold(0).rows_LTB)
    assert found is not None
    assert found.is_whole
    np.testing.assert_array_equal(found.rows_LTB, cold(0).rows_LTB)
    disk.write(name(3), cold(3))
    assert [name(idx) in disk for idx in range(4)] == [True, False, True, True]
    assert disk.num_bytes == len(disk) * PAGE_BYTES == 3 * PAGE_BYTES
    assert sorted(file.name for file in disk.directory.iterdir()) == sorted(
        ["lock", *(name(idx).hex() for idx in (0, 2, 3))]
    )
    disk.drop(name(2))
    assert disk.read(name(2), cold(0).rows_LTB) is None
    disk.close()
    assert not disk.directory.exists()


def test_page_larger_than_the_tier_is_not_written(tmp_path: Path) -> None:
    disk = DiskPages(tmp_path, PAGE_BYTES - 1)
    disk.write(name(0), cold(0))
    assert name(0) not in disk
    disk.close()


def test_short_file_is_no_page(tmp_path: Path) -> None:
    disk = DiskPages(tmp_path, PAGE_BYTES)
    disk.write(name(0), cold(0))
    (disk.directory / name(0).hex()).write_bytes(b"1234567")
    assert disk.read(name(0), cold(0).rows_LTB) is None
    disk.close()


def test_directories_of_dead_owners_are_removed_and_others_stay(tmp_path: Path) -> None:
    living = DiskPages(tmp_path, PAGE_BYTES)
    living.write(name(0), cold(0))
    dead = tmp_path / "moray-pages-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "page").touch()
    stranger = tmp_path / "other"
    stranger.mkdir()
    second = DiskPages(tmp_path, PAGE_BYTES)
    assert not dead.exists()
    assert stranger.is_dir()
    assert living.read(name(0), cold(0).rows_LTB) is not None
    assert living.directory != second.directory
    living.close()
    second.close()


def test_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DiskPages(tmp_path / "file" / "below", PAGE_BYTES)
