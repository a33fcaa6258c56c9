"""Pages in files: the last tier of the cache, gone with the process that made it."""

import contextlib
import fcntl
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wire.frames import Array
from workers.attention.cold_pages import ColdPage

_PREFIX = "moray-pages-"
_LOCK = "lock"


class DiskPages:
    """Pages in files, one each, within so many bytes; gone with the process.

    One thread writes and reads; any thread may ask whether a page is there.
    """

    def __init__(self, parent: Path, limit_bytes: int) -> None:
        """Makes a directory of its own in `parent`, and removes those of processes that are gone.

        Raises:
            OSError: `parent` cannot be written.
        """
        self._limit_bytes = limit_bytes
        self._index: OrderedDict[bytes, int] = OrderedDict()
        """Hash -> checksum, the longest unused first; under the lock."""
        self._page_bytes = 0
        """Of one file: all pages are alike."""
        self._lock = threading.Lock()
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / f"{_PREFIX}{_LOCK}"):
            _remove_left(parent)
            self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._owner = (self.directory / _LOCK).open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, digest: bytes) -> bool:
        with self._lock:
            return digest in self._index

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return len(self._index) * self._page_bytes

    def write(self, digest: bytes, page: ColdPage) -> None:
        """Keeps a page; the longest unused go where there is no room.

        Raises:
            OSError: the file cannot be written.
        """
        self._page_bytes = page.rows_LTB.nbytes
        if self._page_bytes > self._limit_bytes:
            return
        page.rows_LTB.tofile(self._path(digest))
        with self._lock:
            self._index[digest] = page.checksum
            gone = []
            while self.num_bytes > self._limit_bytes:
                gone.append(self._index.popitem(last=False)[0])
        for old in gone:
            self._path(old).unlink(missing_ok=True)

    def read(self, digest: bytes, like_LTB: Array) -> ColdPage | None:
        """The page of a hash, of the shape and dtype of `like_LTB`; None = it is gone or too short.

        Raises:
            OSError: the file cannot be read.
        """
        with self._lock:
            checksum = self._index.get(digest)
            if checksum is None:
                return None
            self._index.move_to_end(digest)
        values = np.fromfile(self._path(digest), dtype=like_LTB.dtype)
        return ColdPage(values.reshape(like_LTB.shape), checksum) if values.size == like_LTB.size else None

    def drop(self, digest: bytes) -> None:
        """Forgets a page."""
        with self._lock:
            self._index.pop(digest, None)
        self._path(digest).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes every file."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._owner.close()

    def _path(self, digest: bytes) -> Path:
        return self.directory / digest.hex()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_left(parent: Path) -> None:
    """Removes the directories whose owner holds no lock any more."""
    for directory in parent.glob(f"{_PREFIX}*"):
        lock = directory / _LOCK
        if lock.is_file():
            with lock.open("r+") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
