"""The handshake: two processes work together only if they speak the same protocol and serve the same model.

Every internal call carries it as gRPC metadata, so that a worker of an older release or of another
checkpoint is refused at once, by name, and never answers with a wrong number.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from wire.errors import HandshakeRefused

PROTOCOL_VERSION = 3
"""Raised by every change of frames or internal protos that an older peer would misread."""

_PROTOCOL_KEY = "moray-protocol"
_MODEL_KEY = "moray-model"
_PAGE_KEY = "moray-page-tokens"


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What two peers must agree on."""

    model: str
    """Fingerprint of the checkpoint; "" = this side serves none and accepts any."""
    page_tokens: int = 0
    """Tokens of a KV page; 0 = this side holds none and accepts any."""
    protocol: int = PROTOCOL_VERSION

    def to_metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of a call."""
        return (
            (_PROTOCOL_KEY, str(self.protocol)),
            (_MODEL_KEY, self.model),
            (_PAGE_KEY, str(self.page_tokens)),
        )


def check_handshake(mine: Handshake, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse a caller that does not fit.

    Raises:
        HandshakeRefused: naming what differs, with both sides' values.
    """
    given = {key: str(value) for key, value in metadata}
    pairs = (
        ("protocol version", str(mine.protocol), given.get(_PROTOCOL_KEY, "none"), ()),
        ("model", mine.model, given.get(_MODEL_KEY, ""), ("",)),
        ("page_tokens", str(mine.page_tokens), given.get(_PAGE_KEY, "0"), ("0",)),
    )
    for what, wanted, got, accepts_any in pairs:
        if wanted != got and wanted not in accepts_any and got not in accepts_any:
            raise HandshakeRefused(
                f"handshake: {what} differs: this worker has {wanted!r}, the caller {got!r}; "
                "run one release and one checkpoint in the whole cluster"
            )
