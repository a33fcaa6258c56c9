"""The checksum: a plain CRC of short data, and of long data one that every changed word moves."""

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wire.checksum import add_checksum

LINE_BYTES = 1021 * 8


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_short_data_has_its_plain_crc(data, crc):
    assert add_checksum(data, crc) == zlib.crc32(data, crc)


def test_long_data_has_the_crc_of_its_line_sums_and_rest():
    """Worked: five lines of the words 0, 1, 2, ... and three bytes behind them."""
    line = np.arange(1021, dtype=np.uint64)
    data = np.tile(line, 5).tobytes() + b"end"
    assert add_checksum(data, 7) == zlib.crc32((line * 5).tobytes() + b"end", 7)


@given(st.integers(0, 6 * LINE_BYTES + 2), st.integers(1, 255), st.integers(0, 2**32))
def test_every_changed_byte_changes_it(position, change, seed):
    data = bytearray(np.random.default_rng(seed).bytes(6 * LINE_BYTES + 3))
    before = add_checksum(data, 0)
    data[position] ^= change
    assert add_checksum(data, 0) != before


@given(st.integers(1, 27), st.integers(1, 4))
def test_rows_that_change_places_change_it(distance, num_values):
    """Rows of 7,168 FP8 or float32 values, as dispatch sends them."""
    rows = np.random.default_rng(distance).integers(0, 256, (28, 7168 * num_values), dtype=np.uint8)
    before = add_checksum(rows.tobytes(), 0)
    rows[[0, distance]] = rows[[distance, 0]]
    assert add_checksum(rows.tobytes(), 0) != before
