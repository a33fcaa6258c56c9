"""Gives freed memory back to the system.

glibc keeps what is freed between allocations that stay, and loading frees several times what it holds on to.
290 MB of BF16 held as INT8 (208 MB) left 100 to 250 MB of such memory behind; with trims it is 10 to 30 MB.
"""

import ctypes

TRIM_BYTES = 8 << 20
"""Bytes of weights between two trims; one takes about a millisecond."""


class HeapTrimmer:
    """Trims each time that so many bytes of weights were packed."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Says that so many bytes are held now in addition."""
        self._num_bytes += num_bytes
        if self._num_bytes >= TRIM_BYTES:
            self._num_bytes = 0
            trim_heap()


def trim_heap() -> None:
    """Returns the pages of the heap that are free; does nothing where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
