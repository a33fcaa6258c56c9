"""Stop strings: where a text ends, and how much of it may be shown before that is known. Pure."""

from dataclasses import dataclass


@dataclass
class StopFilter:
    """Passes a text on, piece by piece, up to the first stop string.

    However the text is cut, the same comes out: the stop string that ends first counts, of those that end
    together the longest. Example: stop string "###"; the pieces "a#", "#b", "##", "#c" give "a", "##b", "",
    "", and then the text is over.
    """

    stops: tuple[str, ...]
    """None of them empty; () = no text is over."""
    is_over: bool = False
    """A stop string was found; neither it nor what follows is passed on."""
    _held: str = ""
    """The end of the text so far that may be the beginning of a stop string."""

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """What can be shown now.

        Args:
            piece: what follows in the text.
            may_stop: a stop string that ends in this piece counts.
        """
        if self.is_over:
            return ""
        text = self._held + piece
        if may_stop and piece:
            begins = self._find(text, after=len(self._held))
            if begins is not None:
                self.is_over, self._held = True, ""
                return text[:begins]
        num_held = self._count_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, *, after: int) -> int | None:
        """Where the stop string begins that ends first behind `after`; the longest of several."""
        found: list[tuple[int, int]] = []
        for stop in self.stops:
            begin = text.find(stop, max(0, after - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        return min(found)[1] if found else None

    def _count_held(self, text: str) -> int:
        """Characters at the end of the text that are a beginning of a stop string, and not all of it."""
        longest = max(map(len, self.stops), default=0)
        for num_chars in range(min(longest - 1, len(text)), 0, -1):
            tail = text[len(text) - num_chars :]
            if any(len(stop) > num_chars and stop.startswith(tail) for stop in self.stops):
                return num_chars
        return 0
