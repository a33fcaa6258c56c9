"""Pages that were given away come back from memory and files with the same bits, or are computed again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reference_data import goldens
from tests.unit.workers.attention.harness import Lab, make_spec, open_engine
from wire.errors import ConfigError
from workers.attention.cache import CacheForm
from workers.attention.types import Source

GOLDEN = goldens("default")[2]
PROMPT = list(GOLDEN.prompt)
"""40 tokens: 10 pages of 4, of which 9 are full before the last token."""
TEXT = GOLDEN.tensor("greedy").tolist()
NUM_PAGES = 16
MEMORY = 1 << 24


def others(lab: Lab, num: int = 3) -> None:
    """Requests that take every page of the cache."""
    for i in range(num):
        lab.run([9 + i] * 40, max_tokens=2)


@pytest.fixture(params=["host", "disk", "both"])
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Room for everything in memory, in files, or a little in memory and the rest in files."""
    page_bytes = 4 * 4 * 300 * 3
    yield {
        "host_tier_bytes": {"host": MEMORY, "disk": 0, "both": 4 * page_bytes}[request.param],
        "disk_tier_bytes": 0 if request.param == "host" else MEMORY,
        "disk_tier_dir": str(tmp_path),
    }
    assert not list(tmp_path.glob("moray-pages-*/")), "the files are gone with the engine"


def written(lab: Lab, path: Path) -> None:
    """Waits until every page that was pushed out of memory is in a file."""
    waiting = lab.engine._tiers._waiting  # type: ignore[union-attr]  the engine has tiers
    lab.until(lambda: not waiting)
    assert path.is_dir()


@pytest.mark.parametrize("form", ["float32", "fp8"])
def test_prompt_that_fell_out_of_the_cache_is_not_computed_again(
    tiers: dict[str, Any], tmp_path: Path, form: CacheForm
) -> None:
    with open_engine("default", kv={"dtype": form}, prefix_reuse=False) as lab:
        expected = lab.run(PROMPT, max_tokens=16)
    with open_engine("default", num_pages=NUM_PAGES, kv={"dtype": form, **tiers}) as lab:
        assert lab.run(PROMPT, max_tokens=16) == expected
        others(lab)
        written(lab, tmp_path)
        computed = lab.metric("tokens_total", phase="prefill")
        assert lab.run(PROMPT, max_tokens=16) == expected
        assert lab.metric("tokens_total", phase="prefill") - computed == 4
        hits = sum(lab.metric("kv_tier_hits_total", tier=tier) for tier in ("host", "disk"))
        assert hits == 9
        assert lab.metric("kv_tier_lost_total", reason="corrupt") == 0
        assert lab.metric("kv_tier_bytes", tier="host") <= tiers["host_tier_bytes"]


def test_many_texts_in_few_pages_are_those_of_an_engine_without_tiers(tiers: dict[str, Any]) -> None:
    prompts = [list(golden.prompt) for golden in goldens("default")[:3]] + [[7, i] * 12 for i in range(5)]
    with open_engine("default", prefix_reuse=False) as lab:
        expected = [lab.run(prompt, max_tokens=12) for prompt in prompts]
    with open_engine("default", num_pages=NUM_PAGES, max_step_tokens=16, kv=tiers) as lab:
        for round_idx in range(3):
            listeners = [
                lab.submit(make_spec(prompt, request_id=f"{round_idx}-{i}", max_tokens=12))
                for i, prompt in enumerate(prompts)
            ]
            assert [listener.tokens() for listener in listeners] == expected
        assert sum(lab.metric("kv_tier_hits_total", tier=tier) for tier in ("host", "disk")) > 0


def test_page_whose_file_was_damaged_is_computed_again(tmp_path: Path) -> None:
    tiers = {"disk_tier_bytes": MEMORY, "disk_tier_dir": str(tmp_path)}
    with open_engine("default", num_pages=NUM_PAGES, kv=tiers) as lab:
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        others(lab)
        written(lab, tmp_path)
        for file in tmp_path.glob("moray-pages-*/*[0-9a-f]"):
            if len(file.name) == 32:
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        assert lab.metric("kv_tier_lost_total", reason="corrupt") == 1, "those behind it are not asked for"
        assert lab.metric("kv_tier_hits_total", tier="disk") == 0


@pytest.mark.parametrize("harm", ["truncated", "removed"])
def test_file_that_is_short_or_gone_costs_the_page_and_nothing_else(tmp_path: Path, harm: str) -> None:
    tiers = {"disk_tier_bytes": MEMORY, "disk_tier_dir": str(tmp_path)}
    with open_engine("default", num_pages=NUM_PAGES, kv=tiers) as lab:
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        others(lab)
        written(lab, tmp_path)
        for file in tmp_path.glob("moray-pages-*/*"):
            if len(file.name) == 32:
                file.write_bytes(b"") if harm == "truncated" else file.unlink()
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        assert lab.metric("kv_tier_hits_total", tier="disk") == 0


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tiers = {"disk_tier_bytes": MEMORY, "disk_tier_dir": str(tmp_path / "file")}
    with pytest.raises(ConfigError, match=r"kv\.disk_tier_dir'?: wanted a directory .*file"):
        open_engine("default", kv=tiers).__enter__()


def test_failure_of_a_write_does_not_stop_those_that_wait(tmp_path: Path) -> None:
    """A write that fails in a way that nobody thought of, then a prompt whose pages are in files."""
    tiers = {"disk_tier_bytes": MEMORY, "disk_tier_dir": str(tmp_path)}
    with open_engine("default", num_pages=NUM_PAGES, kv=tiers) as lab:
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        others(lab)
        written(lab, tmp_path)
        disk = lab.engine._tiers._disk  # type: ignore[union-attr]  the engine has tiers
        disk.write = None  # to call it is a TypeError
        others(lab, 6)
        assert lab.run(PROMPT, max_tokens=16) == TEXT
        assert lab.metric("kv_tier_lost_total", reason="failed") > 0


def test_prefill_for_another_worker_gives_rows_of_cold_pages(tiers: dict[str, Any], tmp_path: Path) -> None:
    with open_engine("default", num_pages=NUM_PAGES, kv=tiers) as lab:
        first = lab.submit(make_spec(PROMPT, request_id="a", source=Source.PREFILL_ONLY))
        first.token()
        others(lab)
        written(lab, tmp_path)
        second = lab.submit(make_spec(PROMPT, request_id="b", source=Source.PREFILL_ONLY))
        second.token()
        for layer_idx in range(3):
            rows = [
                b"".join(r.rows_TB.tobytes() for r in listener.rows() if r.layer_idx == layer_idx)
                for listener in (first, second)
            ]
            assert rows[0] == rows[1]
