"""What has arrived of a hand-over, and what may come next: a pure decision.

Rows of a layer arrive in order of position, without gap and without overlap; one layer may be ahead of
another. With 2 layers and 40 tokens, rows [0, 16) of layer 0 may be followed by [16, 40) of layer 0 or
[0, 16) of layer 1, by nothing else; the first token is accepted when both layers have 40 rows.
"""

from dataclasses import dataclass, field

from wire.errors import FrameInvalid
from workers.attention.types import CacheRows


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a hand-over must bring."""

    num_layers: int
    num_tokens: int
    """Rows of every layer: [first_row, num_tokens)."""
    first_row: int = 0
    """The rows before are there already."""
    num_optional_layers: int = 0
    """Layers behind them of which rows may come, any or none: MTP's rows make better drafts."""
    row_width: int
    """B, places of a stored row."""
    row_dtype: str
    """Of a place."""
    vocab_size: int


@dataclass
class Receipt:
    """The rows of one pull that were accepted so far."""

    wanted: Wanted
    ends: dict[int, int] = field(default_factory=dict)
    """Layer -> position behind its last row."""
    is_done: bool = False
    """Whether the first token was accepted; nothing may follow."""

    def accept_rows(self, rows: CacheRows) -> None:
        """Counts rows that may be stored.

        Raises:
            FrameInvalid: they are not what comes next; its field names the reason.
        """
        begin, end = rows.first_token_idx, rows.first_token_idx + len(rows.rows_TB)
        reason = self._why_not(rows, begin, end)
        if reason:
            what = f"rows [{begin}, {end}) of layer {rows.layer_idx}, shape {rows.rows_TB.shape}"
            raise FrameInvalid(f"cache {what}: {reason}; {self._state(rows.layer_idx)}", field=reason)
        self.ends[rows.layer_idx] = end

    def accept_token(self, token_id: int) -> None:
        """Ends the hand-over.

        Raises:
            FrameInvalid: rows are missing, or the id is none; its field names the reason.
        """
        if self.is_done:
            raise FrameInvalid("a second first token", field="late")
        short = [i for i in range(self.wanted.num_layers) if self._next_row(i) != self.wanted.num_tokens]
        if short or not 0 <= token_id < self.wanted.vocab_size:
            message = f"prefill ended with first token {token_id} and layers {short} incomplete"
            raise FrameInvalid(message, field="incomplete")
        self.is_done = True

    def _why_not(self, rows: CacheRows, begin: int, end: int) -> str:
        """The reason to refuse, or ""; the words are labels of a metric."""
        if self.is_done:
            return "late"
        if not 0 <= rows.layer_idx < self.wanted.num_layers + self.wanted.num_optional_layers:
            return "layer"
        wanted = (self.wanted.row_width, self.wanted.row_dtype)
        is_stored_form = (*rows.rows_TB.shape[1:], rows.rows_TB.dtype.name) == wanted
        if not is_stored_form or begin == end or end > self.wanted.num_tokens:
            return "rows"
        next_row = self._next_row(rows.layer_idx)
        if begin != next_row:
            return "gap" if begin > next_row else "duplicate"
        return ""

    def _next_row(self, layer_idx: int) -> int:
        return self.ends.get(layer_idx, self.wanted.first_row)

    def _state(self, layer_idx: int) -> str:
        wanted = self.wanted
        return (
            f"wanted row {self._next_row(layer_idx)} next, {wanted.num_tokens} rows of width "
            f"{wanted.row_width} in each of {wanted.num_layers} layers"
        )
