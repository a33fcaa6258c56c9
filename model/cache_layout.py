"""What one row of the cache holds, and where."""

from dataclasses import dataclass
from typing import Literal

KeyForm = Literal["float32", "int8"]
"""How the indexer's key is held: as it is, or as one byte a value and a factor."""

_KEYS_PER_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """A row of W float32 places: [latent | rope key | indexer key].

    An INT8 key fills places with the bits of its bytes, value + 128 each, and one more with its factor. With
    V3.2's widths (512, 64, 128) a row has 704 places, with INT8 keys 609.
    """

    latent: int
    """C."""
    rope: int
    """P."""
    index: int
    """I, a multiple of 4."""
    key_form: KeyForm = "float32"

    @property
    def key_begin(self) -> int:
        """Where the indexer's key begins: C + P, attention's key before it."""
        return self.latent + self.rope

    @property
    def width(self) -> int:
        """W."""
        return self.key_begin + (
            self.index if self.key_form == "float32" else self.index // _KEYS_PER_FLOAT + 1
        )
