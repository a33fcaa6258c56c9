"""Hidden states that a sequence keeps until its MTP layer runs over them; T rows, D hidden."""

import torch
from torch import Tensor


class HiddenRows:
    """Final hidden states of positions [first_position, end_position), the newest of a sequence."""

    def __init__(self) -> None:
        """Nothing is kept."""
        self.first_position = 0
        self._parts: list[Tensor] = []
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows that are kept."""
        return self._num_rows

    @property
    def end_position(self) -> int:
        """The position behind the newest row."""
        return self.first_position + self._num_rows

    def append(self, rows_TD: Tensor, *, first_position: int) -> None:
        """Keeps rows; those before are forgotten when these do not follow them."""
        if first_position != self.end_position:
            self.first_position, self._parts, self._num_rows = first_position, [], 0
        self._parts.append(rows_TD)
        self._num_rows += rows_TD.shape[0]

    def keep_newest(self) -> None:
        """Forgets all rows but the newest."""
        self._parts = [self._parts[-1][-1:]]
        self.first_position = self.end_position - 1
        self._num_rows = 1

    def take(self, num_rows: int) -> Tensor:
        """The oldest rows, (num_rows, D), which are kept no longer; at most those that are kept."""
        rows_TD = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._parts = [rows_TD[num_rows:]] if num_rows < self._num_rows else []
        self.first_position += num_rows
        self._num_rows -= num_rows
        return rows_TD[:num_rows]
