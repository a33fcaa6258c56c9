"""Structured output through real servers, with prefill and decode apart; refusals come before any work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from model.byte_tokenizer import FIRST_BYTE_ID, make_tokenizer
from tests.integration.workers.lab import open_cluster, run_test
from tests.reference_data import checkpoint_dir, goldens
from wire.errors import InvalidRequest

EOS = 1
STRUCTURES = {
    "regex": "(yes|no), [a-z]{2,4}[!]",
    "grammar": 'root ::= ("yes" | "no") ", " [a-z]{2,4} "!"',
    "json_schema": json.dumps({"enum": ["yes, ab!", "no, abc!"]}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A reference checkpoint with the byte tokenizer beside it."""
    for path in checkpoint_dir("default").iterdir():
        (tmp_path / path.name).symlink_to(path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("kind", STRUCTURES)
def test_text_follows_the_structure_and_is_the_same_apart_and_together(checkpoint: Path, kind: str) -> None:
    prompt = goldens("default")[2].prompt
    fields: dict[str, Any] = {
        "sampling": {"temperature": 1.0, "seed": 7, kind: STRUCTURES[kind]},
        "stop_token_ids": [EOS],
        "max_tokens": 30,
    }

    async def main() -> None:
        attention: dict[str, dict[str, Any]] = {"prefill-0": {}, "decode-0": {}, "both-0": {}}
        async with open_cluster(checkpoint, attention=attention) as cluster:
            apart = await cluster.generate(prompt, **fields)
            assert await cluster.generate(prompt, at="both-0", prefill="", **fields) == apart
            assert apart[-1] == EOS
            text = bytes(token_id - FIRST_BYTE_ID for token_id in apart[:-1]).decode()
            assert re.fullmatch(STRUCTURES["regex"], json.loads(text) if kind == "json_schema" else text)
            assert cluster.metric("decode-0", "grammars_total", result="compiled") == 1
            assert cluster.metric("prefill-0", "grammars_total", result="compiled") == 0
            await cluster.is_empty()

    run_test(main())


def test_what_does_not_compile_is_refused_before_any_work(checkpoint: Path) -> None:
    async def main() -> None:
        async with open_cluster(checkpoint, attention={"prefill-0": {}, "decode-0": {}}) as cluster:
            with pytest.raises(InvalidRequest) as caught:
                await cluster.generate([5, 6], sampling={"regex": "[0-9"})
            assert caught.value.field == "sampling.regex"
            assert "unclosed character class" in caught.value.message
            assert cluster.metric("prefill-0", "tokens_total", phase="prefill") == 0
            await cluster.is_empty()

    run_test(main())
