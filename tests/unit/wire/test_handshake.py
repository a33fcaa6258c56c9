"""The handshake refuses what does not fit, by name."""

import pytest

from wire.errors import HandshakeRefused
from wire.handshake import PROTOCOL_VERSION, Handshake, check_handshake

MINE = Handshake(model="f00d", page_tokens=64)


@pytest.mark.parametrize(
    "theirs",
    [
        MINE,
        Handshake(model="", page_tokens=64),
        Handshake(model="f00d", page_tokens=0),
        Handshake(model=""),
    ],
)
def test_peer_that_fits_passes(theirs):
    check_handshake(MINE, theirs.to_metadata())


def test_side_that_serves_nothing_accepts_any():
    check_handshake(Handshake(model=""), MINE.to_metadata())


@pytest.mark.parametrize(
    ("theirs", "what", "value"),
    [
        (Handshake(model="beef", page_tokens=64), "model", "beef"),
        (Handshake(model="f00d", page_tokens=32), "page_tokens", "32"),
        (Handshake(model="f00d", page_tokens=64, protocol=PROTOCOL_VERSION + 1), "protocol version", "3"),
    ],
)
def test_peer_that_differs_is_refused_with_both_values(theirs, what, value):
    with pytest.raises(HandshakeRefused, match=what) as caught:
        check_handshake(MINE, theirs.to_metadata())
    assert repr(value) in caught.value.message


def test_caller_without_a_handshake_is_refused():
    with pytest.raises(HandshakeRefused, match="protocol version"):
        check_handshake(MINE, ())


def test_foreign_metadata_is_ignored():
    check_handshake(MINE, (*MINE.to_metadata(), ("user-agent", "grpc"), ("trace-bin", b"\x01")))
