"""Tiers below the page cache: full pages that are given away go to host memory, and from there to files.

The engine's thread copies rows, nothing more; a thread of its own writes and reads the files. A sequence
whose prefix has pages in files waits until they are read; others run meanwhile. A page whose bytes have
changed is dropped and counted, and computed again.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from wire.metrics import Metrics
from workers.attention.cache import PagedCache
from workers.attention.cold_pages import ColdPage, Fetch, HostPages, sum_bytes
from workers.attention.disk_pages import DiskPages

_log = logging.getLogger(__name__)

_MAX_WAITING_WRITES = 64
"""Pages that wait to be written; more are dropped, for the disk is slower than the engine."""
_MAX_FETCH_BYTES = 1 << 30
"""Read ahead for one sequence at most."""

_STOP, _READ, _WRITE = range(3)
"""Jobs of the thread, the most urgent first."""


class PageTiers:
    """Cold pages by the hash of their prefix; the engine thread is its only user."""

    def __init__(
        self, cache: PagedCache, *, host_bytes: int, disk: DiskPages | None, metrics: Metrics
    ) -> None:
        self._cache = cache
        self._host = HostPages(host_bytes)
        self._disk = disk
        self._metrics = metrics
        self._waiting: dict[bytes, ColdPage] = {}
        """Pages to be written; put in by the engine's thread, taken out by the tiers'."""
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._on_fetched: Callable[[], None] = lambda: None
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="engine-tiers", daemon=True)
        if disk is not None:
            self._thread.start()

    def when_fetched(self, on_fetched: Callable[[], None]) -> None:
        """Is told on the tiers' thread whenever a fetch is done."""
        self._on_fetched = on_fetched

    def keep(self, page: int, digest: bytes) -> None:
        """Takes over a page of the cache that is given away."""
        if self._host.get(digest) is None and not self._is_below(digest):
            rows_LTB = self._cache.read_page(page)
            self._settle(self._host.put(digest, ColdPage(rows_LTB, sum_bytes(rows_LTB))))
        self._show()

    def fetch(self, digests: Sequence[bytes]) -> Fetch | None:
        """Begins to read the pages of a prefix that are in files; None = nothing is to be waited for."""
        if self._disk is None or not self._thread.is_alive():
            return None
        wanted = []
        for digest in digests[: _MAX_FETCH_BYTES // self._cache.page_bytes]:
            if self._host.get(digest) is None and digest not in self._waiting:
                if digest not in self._disk:
                    break
                wanted.append(digest)
        if not wanted:
            return None
        fetch = Fetch(tuple(wanted))
        self._submit(_READ, partial(self._read, self._disk, fetch))
        return fetch

    def restore(self, digest: bytes, page: int, fetch: Fetch | None) -> bool:
        """Whether a cold page was there, and its rows are in a page of the cache now."""
        tier, cold = "host", self._host.get(digest)
        if cold is None:
            tier, cold = "disk", self._waiting.get(digest) or (fetch.pages.get(digest) if fetch else None)
        if cold is None:
            return False
        if not cold.is_whole:
            self._lose(digest, "corrupt")
            return False
        self._cache.write_page(page, cold.rows_LTB)
        self._metrics.counter("kv_tier_hits_total", tier=tier).inc()
        return True

    def check_integrity(self) -> None:
        """The accounts of host memory are right.

        Raises:
            RuntimeError: they are not.
        """
        self._host.check_integrity()

    def close(self) -> None:
        """Ends the thread and removes the files."""
        self._is_closing = True
        if self._disk is not None:
            self._submit(_STOP, lambda: None)
            self._thread.join()
            self._disk.close()

    def _is_below(self, digest: bytes) -> bool:
        return digest in self._waiting or (self._disk is not None and digest in self._disk)

    def _settle(self, pushed_out: list[tuple[bytes, ColdPage]]) -> None:
        """Has pages written that host memory has no room for."""
        for digest, cold in pushed_out:
            if self._disk is None or self._is_below(digest):
                continue
            if len(self._waiting) >= _MAX_WAITING_WRITES:
                self._metrics.counter("kv_tier_lost_total", reason="backlog").inc()
                continue
            self._waiting[digest] = cold
            self._submit(_WRITE, partial(self._write, self._disk, digest, cold))

    def _lose(self, digest: bytes, reason: str) -> None:
        self._metrics.counter("kv_tier_lost_total", reason=reason).inc()
        self._host.drop(digest)
        if self._disk is not None:
            self._disk.drop(digest)

    def _show(self) -> None:
        tiers: list[tuple[str, HostPages | DiskPages]] = [("host", self._host)]
        if self._disk is not None:
            tiers.append(("disk", self._disk))
        for name, tier in tiers:
            self._metrics.gauge("kv_tier_pages", tier=name).set(len(tier))
            self._metrics.gauge("kv_tier_bytes", tier=name).set(tier.num_bytes)

    # ---- the tiers' thread ----

    def _submit(self, urgency: int, job: Callable[[], None]) -> None:
        self._jobs.put((urgency, next(self._numbers), job))

    def _work(self) -> None:
        while not self._is_closing:
            _, _, job = self._jobs.get()
            try:
                job()
            except Exception:  # noqa: BLE001  the thread must live on, sequences wait for it; logged and counted
                self._metrics.counter("kv_tier_lost_total", reason="failed").inc()
                _log.exception("a job of the KV tiers failed")

    def _write(self, disk: DiskPages, digest: bytes, cold: ColdPage) -> None:
        try:
            disk.write(digest, cold)
        except OSError as error:
            self._failed("write_failed", error)
        finally:
            self._waiting.pop(digest, None)

    def _read(self, disk: DiskPages, fetch: Fetch) -> None:
        """Fills a fetch up to the first page that is not there."""
        try:
            for digest in fetch.digests:
                cold = disk.read(digest, self._cache.page_like)
                if cold is None or self._is_closing:
                    break
                fetch.pages[digest] = cold
        except OSError as error:
            self._failed("read_failed", error)
        finally:
            fetch.is_done = True
            self._on_fetched()

    def _failed(self, reason: str, error: OSError) -> None:
        self._metrics.counter("kv_tier_lost_total", reason=reason).inc()
        _log.warning("a cold KV page is lost: %s", error)
