"""Pieces of one area of bytes, lent and given back: a pure decision.

A piece lies in the first gap that is long enough, and begins at a multiple of 64. Of 256 bytes, pieces of 70,
50 and 10 begin at 0, 128 and 192; when the first is back, one of 100 begins at 0, and one of 129 has no room.
"""

from dataclasses import dataclass, field

_ALIGN_BYTES = 64


@dataclass
class ByteRanges:
    """Who owns an area keeps one of these and asks it before it writes."""

    num_bytes: int
    """Of the area."""
    _begin_to_end: dict[int, int] = field(default_factory=dict)

    @property
    def num_lent(self) -> int:
        """Pieces that were not given back."""
        return len(self._begin_to_end)

    def lend(self, num_bytes: int) -> int | None:
        """Where a piece of so many bytes begins; None = there is no room now."""
        length = num_bytes + -num_bytes % _ALIGN_BYTES
        begin = 0
        for taken in sorted(self._begin_to_end):
            if begin + length <= taken:
                break
            begin = self._begin_to_end[taken]
        if length <= 0 or begin + length > self.num_bytes:
            return None
        self._begin_to_end[begin] = begin + length
        return begin

    def give_back(self, begin: int) -> None:
        """Takes back the piece that begins here.

        Raises:
            KeyError: none does.
        """
        del self._begin_to_end[begin]

    def check_integrity(self) -> None:
        """Checks that no two pieces overlap.

        Raises:
            RuntimeError: they do, or one lies outside the area.
        """
        last = 0
        for begin in sorted(self._begin_to_end):
            if begin < last or self._begin_to_end[begin] > self.num_bytes:
                raise RuntimeError(
                    f"bytes [{begin}, {self._begin_to_end[begin]}) lie outside or are lent twice"
                )
            last = self._begin_to_end[begin]
