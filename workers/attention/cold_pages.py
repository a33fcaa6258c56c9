"""Pages that fell out of the cache, kept in host memory: the longest unused go first.

Letters: L layers, T tokens of a page, B places of a stored row.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from wire.checksum import add_checksum
from wire.frames import Array


@dataclass(frozen=True)
class ColdPage:
    """The rows of a page, and what their bytes added up to when they left the cache."""

    rows_LTB: Array
    checksum: int

    @property
    def is_whole(self) -> bool:
        """Whether no byte has changed since."""
        return sum_bytes(self.rows_LTB) == self.checksum


def sum_bytes(rows_LTB: Array) -> int:
    """The checksum of contiguous rows."""
    return add_checksum(rows_LTB.data.cast("B"), 0)


@dataclass
class Fetch:
    """Pages on their way from files to a sequence; filled by the tiers' thread, read when it is done."""

    digests: tuple[bytes, ...]
    pages: dict[bytes, ColdPage] = field(default_factory=dict)
    is_done: bool = False


class HostPages:
    """Pages in host memory, within so many bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pages: OrderedDict[bytes, ColdPage] = OrderedDict()
        self.num_bytes = 0
        """Of all pages."""

    def __len__(self) -> int:
        return len(self._pages)

    def get(self, digest: bytes) -> ColdPage | None:
        """The page of a hash, which is the last to go now."""
        page = self._pages.get(digest)
        if page is not None:
            self._pages.move_to_end(digest)
        return page

    def put(self, digest: bytes, page: ColdPage) -> list[tuple[bytes, ColdPage]]:
        """Keeps a page that is not there; the pages that had to go, itself when it is too large."""
        self._pages[digest] = page
        self.num_bytes += page.rows_LTB.nbytes
        pushed_out = []
        while self.num_bytes > self._limit_bytes:
            pushed_out.append(self._pages.popitem(last=False))
            self.num_bytes -= pushed_out[-1][1].rows_LTB.nbytes
        return pushed_out

    def drop(self, digest: bytes) -> None:
        """Forgets a page."""
        page = self._pages.pop(digest, None)
        if page is not None:
            self.num_bytes -= page.rows_LTB.nbytes

    def check_integrity(self) -> None:
        """The bytes are those of the pages, and within the limit.

        Raises:
            RuntimeError: they are not.
        """
        num_bytes = sum(page.rows_LTB.nbytes for page in self._pages.values())
        if num_bytes != self.num_bytes or num_bytes > self._limit_bytes:
            message = f"{num_bytes} bytes, counted {self.num_bytes}, limit {self._limit_bytes}"
            raise RuntimeError(f"pages in host memory have {message}")
