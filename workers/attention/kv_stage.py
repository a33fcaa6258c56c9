"""The prefill worker's memory from which decode workers read rows over NIXL; lives on the event loop.

A piece is free again when its reader said that it has read it, or when the pull ends. Who still reads then
may find other rows there: their checksum differs from the one that the reader was told, and it refuses them.
"""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from wire.checksum import add_checksum
from workers.attention.byte_ranges import ByteRanges
from workers.attention.kv_transfer import Place, PlacedRows
from workers.attention.nixl_link import NixlLink
from workers.attention.types import CacheRows


@dataclass
class Pieces:
    """The pieces of one pull that were not read yet."""

    max_bytes: int
    """What its reader takes at once; 0 = nothing."""
    was_introduced: bool = False
    """Whether it was told who this agent is."""
    unread: "set[asyncio.Future[None]]" = field(default_factory=set)

    def give_up(self) -> None:
        """Frees what nobody is going to read."""
        for reading in list(self.unread):
            reading.cancel()

    async def wait_read(self, limit_s: float) -> None:
        """Waits until everything was read, or so long."""
        if self.unread:
            await asyncio.wait(list(self.unread), timeout=limit_s)


class KvStage:
    """Copies rows to where others read them."""

    def __init__(self, link: NixlLink, *, wait_s: float) -> None:
        """Takes how long rows wait for room before they go in a plain frame."""
        self._link = link
        self._wait_s = wait_s
        self._ranges = ByteRanges(link.staging.nbytes)
        self._tickets: Iterator[int] = itertools.count()
        self._freed = asyncio.Event()

    def open(self, max_bytes: int) -> Pieces:
        """The pieces of a new pull, whose reader takes so many bytes at once."""
        return Pieces(min(max_bytes, self._link.area_bytes))

    async def place(self, pieces: Pieces, rows: CacheRows) -> PlacedRows | None:
        """Leaves rows to be read; None = they do not fit in time, or at all."""
        data = np.ascontiguousarray(rows.rows_TB).reshape(-1).view(np.uint8)
        if not 0 < data.nbytes <= min(pieces.max_bytes, self._link.area_bytes):
            return None
        try:
            async with asyncio.timeout(self._wait_s):
                begin = await self._lend(data.nbytes)
        except TimeoutError:
            return None
        self._link.staging[begin : begin + data.nbytes] = data
        place = Place(
            agent=self._link.name,
            agent_metadata=b"" if pieces.was_introduced else self._link.metadata,
            address=self._link.staging.ctypes.data + begin,
            checksum=add_checksum(data.data, 0),
            ticket=next(self._tickets),
        )
        pieces.was_introduced = True
        self._watch(pieces, place.ticket, begin)
        num_rows, row_width = rows.rows_TB.shape
        return PlacedRows(
            layer_idx=rows.layer_idx,
            first_token_idx=rows.first_token_idx,
            num_rows=num_rows,
            row_width=row_width,
            row_dtype=rows.rows_TB.dtype.name,
            place=place,
        )

    def check_integrity(self) -> None:
        """Checks the pieces.

        Raises:
            RuntimeError: two overlap.
        """
        self._ranges.check_integrity()

    @property
    def num_lent(self) -> int:
        """Pieces that are not free."""
        return self._ranges.num_lent

    async def _lend(self, num_bytes: int) -> int:
        while (begin := self._ranges.lend(num_bytes)) is None:
            self._freed.clear()
            await self._freed.wait()
        return begin

    def _watch(self, pieces: Pieces, ticket: int, begin: int) -> None:
        reading = asyncio.wrap_future(self._link.watch(ticket))

        def end(_: "asyncio.Future[None]") -> None:
            pieces.unread.discard(reading)
            self._ranges.give_back(begin)
            self._freed.set()

        pieces.unread.add(reading)
        reading.add_done_callback(end)
