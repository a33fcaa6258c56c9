"""Log-probabilities through real servers: the same with prefill and decode apart as in one worker."""

from typing import Any

import pytest

from tests.integration.workers.lab import Cluster, open_cluster, run_test
from tests.reference_data import goldens

SAMPLINGS = [{"logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 1, "temperature": 1.0, "seed": 5}]


async def ask(cluster: Cluster, prompt: list[int], **fields: Any) -> tuple[list[int], list[Any], list[Any]]:
    """Tokens, their log-probabilities, those of the prompt."""
    events = [event async for event in cluster.open_generate(prompt, max_tokens=5, **fields)]
    tokens = [token for event in events for token in event.token_ids]
    of_tokens = [one for event in events for one in event.logprobs]
    return tokens, of_tokens, [one for event in events for one in event.prompt_logprobs]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["tokens", "prompt"])
def test_apart_and_together_tell_the_same_and_change_no_token(sampling: dict[str, Any]) -> None:
    prompt = goldens("default")[2].prompt
    plain = {key: value for key, value in sampling.items() if not key.endswith("logprobs")}

    async def main() -> None:
        async with open_cluster(
            "default", attention={"prefill-0": {}, "decode-0": {}, "both-0": {}}
        ) as cluster:
            tokens, _, _ = await ask(cluster, prompt, sampling=plain)
            apart = await ask(cluster, prompt, sampling=sampling)
            together = await ask(cluster, prompt, sampling=sampling, at="both-0", prefill="")
            assert apart == together
            assert apart[0] == tokens
            assert len(apart[1]) == len(tokens)
            assert all(len(one.top_token_ids) == sampling["logprobs"] for one in apart[1])
            num_told = len(prompt) - 1 if "prompt_logprobs" in sampling else 0
            assert len(apart[2]) == num_told
            await cluster.is_empty()

    run_test(main())


def test_cached_tokens_are_counted_though_the_last_row_is_computed_again() -> None:
    """40 tokens in pages of 4: all come from the first request, or all but the last row."""
    prompt = goldens("default")[2].prompt

    async def num_cached(cluster: Cluster, **fields: Any) -> int:
        return max(
            [event.num_cached_tokens async for event in cluster.open_generate(prompt, max_tokens=3, **fields)]
        )

    async def main() -> None:
        async with open_cluster("default", attention={"prefill-0": {}, "decode-0": {}}) as cluster:
            assert await num_cached(cluster) == 0
            assert await num_cached(cluster) == 40
            assert await num_cached(cluster, sampling={"logprobs": 0}) == 39
            assert await num_cached(cluster, sampling={"prompt_logprobs": 0}) == 0

    run_test(main())
