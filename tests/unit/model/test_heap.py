import ctypes

import pytest

from model import heap
from model.heap import TRIM_BYTES, HeapTrimmer, trim_heap


def test_trimmer_trims_once_for_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(heap, "trim_heap", lambda: trims.append(None))
    trimmer = HeapTrimmer()
    for _ in range(10):
        trimmer.count(TRIM_BYTES // 4)
    assert len(trims) == 2


def test_trimming_is_nothing_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    trim_heap()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    trim_heap()
